"""A grid of recipes and languages with dense statistics in one sweep, against one run a variant the published way.

    make benchmarks, or pytest tests/benchmarks/test_dense_grid.py -s

The published scripts know pruned propagation only. They are timed on the first blocks of one variant of each recipe;
that is scaled up to all languages and blocks.
"""

from __future__ import annotations

import pytest
from benchmarks import published
from benchmarks.harness import Clock, calibration_text, headline, in_words, number, pairs, seconds, token_blocks

from pruning import Anatomy, Recipe, load_model
from pruning.engine import Job, sweep

LANGUAGES = ("ar", "de", "en", "es", "ru", "sw", "zh")
#: Method, pattern and its group.
RECIPES = (("wanda", "row", 0), ("wanda", "2:4", 4), ("sparsegpt", "matrix", 0), ("sparsegpt", "2:4", 4))


@pytest.mark.parametrize("size", pairs("SIZES", "128x512"), ids=in_words)
def test_a_grid_over_single_runs(size, monkeypatch, capsys):
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    anatomy = Anatomy(model)
    samples, length = size
    every = len(anatomy.blocks)
    blocks = min(number("BLOCKS", every), every)
    sample = min(number("SAMPLE", 2), blocks)
    text, sets = calibration_text({lang: token_blocks(tokenizer, lang, samples, length) for lang in LANGUAGES})
    recipes = [
        Recipe(method=method, sparsity=0.5, pattern=pattern, propagation="dense", blocks=f"0:{blocks}")
        for method, pattern, _ in RECIPES
    ]
    jobs = [Job(recipe, calibration) for calibration in sets.values() for recipe in recipes]
    dense = {key: anatomy.weight(*key).clone() for key in anatomy if key[0] < sample}
    ids = text.tokens[text.pieces[sets["en"]][0]]

    with capsys.disabled():
        headline(
            f"{len(jobs)} variants with dense statistics ({len(LANGUAGES)} languages x {len(RECIPES)} recipes), "
            f"{samples} x {length} tokens a language, {blocks} of {every} blocks"
        )
        published.passes(anatomy, ids[:1], sample, 1)
        each = {}
        for method, pattern, group in RECIPES:
            each[f"{method} {pattern}"] = seconds(
                lambda m=method, g=group: published.prune(anatomy, ids, m, 0.5, g, sample)
            )
            for key, weight in dense.items():
                anatomy.set_weight(*key, weight)
        results = []
        clock = Clock()
        clock.watch(monkeypatch)
        ours = seconds(lambda: results.append(sweep(anatomy, jobs, text)))
        theirs = sum(each.values()) * len(LANGUAGES) * blocks / sample
        print("  published way, seconds a block of one variant: ", end="")
        print(", ".join(f"{name} {value / sample:.1f}" for name, value in each.items()))
        print(f"  published way, {len(jobs)} variants one by one: {theirs:.0f} s", end="")
        print(f" (scaled up from {sample} blocks of one variant of each recipe)")
        print(f"  ours: {ours:.0f} s in one sweep")
        clock.report(ours, ours, "our whole time")
        print(f"  published way, scaled / ours: {theirs / ours:.2f}")
    for job in jobs:
        assert results[0](job).masks.sparsity() == pytest.approx(0.5, abs=1e-3)
