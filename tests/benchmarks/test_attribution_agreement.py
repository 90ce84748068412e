"""How well gradients predict exact patching, within one kind of component.

    .venv/bin/python -m pytest tests/benchmarks/test_attribution_agreement.py -s

Not a matter of speed, but of half an hour. On the embedded model, for a Wanda and a SparseGPT variant calibrated on
Swahili and asked in English: the twenty masks, and the twenty outputs, that attribution ranks highest, and forty of
each drawn at random, are restored exactly. Beside plain attribution (gradients of the pruned model) stands its
integrated form: gradients averaged over models between the pruned and the dense one, at the midpoints of equal steps
along the straight line between their weights.

    PRUNESCOPE_BENCH_STEPS     steps of the integrated form, such as 4
    PRUNESCOPE_BENCH_SEGMENTS  held-out segments; or, with PRUNESCOPE_BENCH_PAIRS above 0, minimal pairs of every category
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
from benchmarks.harness import number
from scipy.stats import norm, spearmanr

from probes import DamagedModel, ItemSource, Session, attribute, item_questions, patch, text_questions
from probes.items import CATEGORIES, some_twins
from probes.patching import RESTORE, role_output, role_weights
from pruning import CalibrationSet, Corpus, Recipe, load_model, prune, text_source

TOP, SAMPLE = number("TOP", 20), number("SAMPLE", 40)
STEPS = number("STEPS", 4)
SEGMENTS = number("SEGMENTS", 24)
PAIRS = number("PAIRS", 0)
KINDS = {"weights": role_weights, "output": role_output}


class Between:
    """The models on the line from a pruned one to the dense one, as something that can be attributed like the pruned."""

    def __init__(self, session, damage, share):
        self._anatomy, self._owner, self._damage, self._share = session.anatomy, session.owner, damage, share

    biases = ()

    def damaged(self):
        return _Mixed(self)

    def differentiable_biases(self):
        return nullcontext()

    def change(self, key):
        return self._damage.change(key)


class _Mixed:
    def __init__(self, between):
        self._between = between

    def __enter__(self):
        self._set(self._between._share)

    def __exit__(self, *_):
        self._set(1.0)

    def _set(self, share):
        here = self._between
        for key in here._damage.projections:
            dense = here._owner.dense[key]
            here._anatomy.set_weight(
                *key, dense - (1 - share) * here._damage.change(key).to(dense) if share < 1 else dense
            )


def integrated(session, questions, damage, components, steps):
    """Return the effect of each component by gradients at `steps` models between the pruned and the dense one.

    Attribution at such a model multiplies its gradient by what is left of the change of activations, or by the whole
    change of weights; activations on the line move nearly linearly, so what is left is scaled up to the whole.
    """
    total = np.zeros(len(components))
    for step in range(steps):
        share = (step + 0.5) / steps
        found = attribute(session, questions, Between(session, damage, share), components, direction=RESTORE)
        for i, component in enumerate(components):
            total[i] += found.attributed[i].sum() / (1 if component.weights else 1 - share)
    return total / steps


def interval(rho, n):
    margin = norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return tuple(np.tanh(np.arctanh(min(rho, 0.9999)) + sign * margin) for sign in (-1, 1))


def test_gradients_against_exact_patching(capsys):
    model, tokenizer = load_model("demo")
    source = text_source("bundled")
    corpus = Corpus(source, source, source)
    session = Session(model, tokenizer, batch_tokens=2048)
    if PAIRS:
        everything = ItemSource().items("en")
        items = [i for name in CATEGORIES for i in some_twins([j for j in everything if j.category == name], PAIRS)]
        questions = item_questions(session, items)
    else:
        questions = text_questions(session, corpus.take("heldout", "en", SEGMENTS))
    recipes = [Recipe(method=method, sparsity=0.5) for method in ("wanda", "sparsegpt")]
    sets = [CalibrationSet.named("sw", samples=32, length=128)]
    rng = np.random.default_rng(0)
    for variant in prune(model, tokenizer, recipes, corpus, sets):
        damage = DamagedModel(session.owner, variant)
        for kind, component in KINDS.items():
            every = [component(*key) for key in damage.projections]
            plain = attribute(session, questions, damage, every)
            estimates = {"gradients": np.array([plain.attributed[i].sum() for i in range(len(every))])}
            if STEPS:
                estimates[f"integrated, {STEPS} steps"] = integrated(session, questions, damage, every, STEPS)
            drop = plain.dense.margin.sum() - plain.pruned.margin.sum()
            sample = rng.choice(len(every), min(SAMPLE, len(every)), replace=False)
            tops = {name: np.argsort(-values)[:TOP] for name, values in estimates.items()}
            chosen = sorted({int(i) for some in (sample, *tops.values()) for i in some})
            patched = patch(session, questions, damage, [every[i] for i in chosen])
            exact = dict(
                zip(
                    chosen,
                    [patched.exact[j].margin.sum() - patched.pruned.margin.sum() for j in range(len(chosen))],
                    strict=True,
                )
            )
            for name, values in estimates.items():
                for over, which in ((f"{SAMPLE} at random", sample), (f"first {TOP}", tops[name])):
                    real = np.array([exact[int(i)] for i in which])
                    rho = float(spearmanr(real, values[which]).statistic)
                    low, high = interval(rho, len(which))
                    best = set(sample[np.argsort(-real)][:10].tolist()) if which is sample else set()
                    shared = len(best & set(sample[np.argsort(-values[sample])][:10].tolist())) if best else None
                    slope = float((real * values[which]).sum() / (values[which] ** 2).sum())
                    with capsys.disabled():
                        print(
                            f"{variant.id} {kind}, {name}, {over}: rho {rho:.2f} [{low:.2f}, {high:.2f}], exact per "
                            f"estimated {slope:.2f}, mean recovered {100 * real.mean() / drop:.1f} % "
                            f"(estimated {100 * values[which].mean() / drop:.1f} %)"
                            + (f", {shared} of the first ten" if shared is not None else ""),
                            flush=True,
                        )
            assert np.isfinite(list(exact.values())).all()
