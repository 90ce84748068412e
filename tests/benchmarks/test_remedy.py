"""Whether sparing what a diagnosis found helps, on questions and text that the diagnosis has not seen.

    .venv/bin/python -m pytest tests/benchmarks/test_remedy.py -s

Not a matter of speed, but of half an hour: for every calibration set a uniform variant is diagnosed on the first half
of the templates of items (all languages and categories) and of the held-out text; then uniform, OWL, the diagnosis and
random reallocations of the same shape are pruned at the same sparsity with several seeds, and judged on the second
half.

    PRUNESCOPE_BENCH_PAIRS    minimal pairs of each category and language
    PRUNESCOPE_BENCH_SPREAD   how far a matrix's sparsity may differ, such as "0.08"
    PRUNESCOPE_BENCH_SETS     calibration sets, such as "en sw"
    PRUNESCOPE_BENCH_ASKED    languages that are diagnosed and judged, such as "de en es zh"
"""

from __future__ import annotations

import os

import numpy as np
from benchmarks.harness import number

from analysis.frames import dense_columns
from analysis.stats.bootstrap import segment_interval
from probes import DENSE, DamagedModel, ItemSource, Session, attribute, item_questions, score, text_questions
from probes.items import CATEGORIES, some_twins
from probes.patching import role_weights
from pruning import CalibrationSet, Corpus, Recipe, load_model, prune, text_source
from pruning.text.sources import BUNDLED_LANGUAGES
from pruning.variants.owner import DenseModel

SPREAD = float(os.environ.get("PRUNESCOPE_BENCH_SPREAD") or 0.08)
ASKED = (os.environ.get("PRUNESCOPE_BENCH_ASKED") or " ".join(BUNDLED_LANGUAGES)).split()
SETS = (os.environ.get("PRUNESCOPE_BENCH_SETS") or "en sw").split()
SEEDS = range(number("SEEDS", 2))
SHUFFLES = range(1, number("SHUFFLES", 2) + 1)
SEGMENTS = number("SEGMENTS", 48)
PAIRS = number("PAIRS", 12)


def half(values, which):
    names = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in values))}
    return [value for name, value in values if names[name] % 2 == which]


def recipes(importance):
    common = {"method": "wanda", "sparsity": 0.5}
    yield "uniform", Recipe(**common)
    yield "owl", Recipe(**common, allocation="owl")
    own = {**common, "allocation": "diagnosis", "importance": importance}
    yield "diagnosis", Recipe(**own, parameters={"spread": SPREAD})
    for shuffle in SHUFFLES:
        yield "random", Recipe(**own, parameters={"spread": SPREAD, "shuffle": shuffle})


def test_a_remedy_is_judged_on_what_it_has_not_seen(capsys):
    model, tokenizer = load_model("demo")
    source = text_source("bundled")
    corpus = Corpus(source, source, source)
    session = Session(model, tokenizer, batch_tokens=2048)
    items = {lang: some_twins(ItemSource().items(lang), 2 * PAIRS) for lang in ASKED}
    text = {lang: corpus.take("heldout", lang, SEGMENTS) for lang in ASKED}

    def questions(which):
        asked = {lang: half([(i.template, i) for i in items[lang]], which) for lang in items}
        read = {lang: half([(s.id, s) for s in text[lang]], which) for lang in items}
        return (
            asked,
            {lang: item_questions(session, asked[lang]) for lang in items},
            {lang: text_questions(session, read[lang]) for lang in items},
        )

    _, fit_items, fit_text = questions(0)
    asked, judged_items, judged_text = questions(1)
    copy = DenseModel(model)
    losses, scores = {}, {}

    def judge(name):
        for lang in items:
            scores[name, lang] = score(session, judged_items[lang])
            found = score(session, judged_text[lang])
            tokens = np.array([len(question.targets) for question in judged_text[lang]])
            losses[name, lang] = -found.right, tokens

    judge(DENSE)
    columns = {DENSE: dense_columns("demo")}
    groups = {}
    for calibrated in SETS:
        for seed in SEEDS:
            chosen = CalibrationSet.named(
                calibrated, all_languages=BUNDLED_LANGUAGES, samples=32, length=128, seed=seed
            )
            if seed == SEEDS[0]:
                (plain,) = prune(model, tokenizer, Recipe(method="wanda", sparsity=0.5), corpus, chosen)
                damage = DamagedModel(DenseModel(model), plain)
                matrices = [role_weights(*key) for key in damage.projections]
                importance = dict.fromkeys((f"{c.layer}.{c.role}" for c in matrices), 0.0)
                for fitted in (fit_items, fit_text):
                    everything = [question for lang in items for question in fitted[lang]]
                    found = attribute(session, everything, damage, matrices)
                    gap = (found.dense.margin - found.pruned.margin).sum()
                    for number_, c in enumerate(matrices):
                        importance[f"{c.layer}.{c.role}"] += float(found.attributed[number_].sum() / gap)
            named = dict(recipes(importance))
            wanted = [recipe for _, recipe in recipes(importance)]
            kinds = [name for name, _ in recipes(importance)]
            assert len(named) == 4
            for kind, variant in zip(kinds, prune(model, tokenizer, wanted, corpus, chosen), strict=True):
                assert abs(variant.masks.sparsity() - 0.5) < 1e-3
                columns[variant.id] = variant.columns()
                groups.setdefault((calibrated, kind), []).append(variant.id)
                with copy.pruned_to(variant):
                    judge(variant.id)
                with capsys.disabled():
                    print(".", end="", flush=True)
    with capsys.disabled():
        print()
        for calibrated in SETS:
            table(calibrated, groups, scores, losses, asked)


def table(calibrated, groups, scores, losses, asked):
    languages = list(asked)
    twins = [(item.template, item.category) for lang in languages for item in asked[lang][::2]]
    names = list(dict.fromkeys(template for template, _ in twins))
    cluster = np.array([names.index(template) for template, _ in twins])

    def right(name):
        margins = np.concatenate([scores[name, lang].margin for lang in languages])
        return (margins[0::2] + margins[1::2] > 0).astype(float)

    def loss(name):
        return np.concatenate([losses[name, lang][0] / losses[name, lang][1] for lang in languages])

    def interval(values, groups_):
        sums = np.stack([np.bincount(groups_, values), np.bincount(groups_)], axis=1)
        value, low, high = segment_interval(lambda w: (w @ sums[:, :1]) / (w @ sums[:, 1:]), len(sums))
        return f"{value[0]:+.4f} [{low[0]:+.4f}, {high[0]:+.4f}]"

    segments = len(losses[DENSE, languages[0]][0])
    ids = np.tile(np.arange(segments), len(languages))
    base_right = np.mean([right(name) for name in groups[calibrated, "uniform"]], axis=0)
    base_loss = np.mean([loss(name) for name in groups[calibrated, "uniform"]], axis=0)
    print(
        f"calibrated on {calibrated}: dense {right(DENSE).mean():.3f} twins right, {loss(DENSE).mean():.3f} nat a token"
    )
    print(f"  uniform: {base_right.mean():.3f} twins right, {base_loss.mean():.3f} nat a token")
    for kind in ("owl", "diagnosis", "random"):
        members = groups[calibrated, kind]
        gained = np.mean([right(name) for name in members], axis=0) - base_right
        added = np.mean([loss(name) for name in members], axis=0) - base_loss
        print(
            f"  {kind} ({len(members)} variants) minus uniform: twins {interval(gained, cluster)}, "
            f"nat a token {interval(added, ids)}"
        )
        for category in CATEGORIES:
            own = np.array([c == category for _, c in twins])
            print(f"    {category}: {interval(gained[own], np.unique(cluster[own], return_inverse=True)[1])}")
        each = [f"{(loss(name) - base_loss).mean():+.4f}" for name in members]
        print(f"    nat a token of each variant: {', '.join(each)}")
