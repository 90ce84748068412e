"""Methods that remove whole neurons and heads, on every architecture, against naive float64 versions."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import naive
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from pairwise import all_pairs, pairwise
from reference import catch_inputs, derivatives, double, double_model, job, run_model, text

from pruning import Anatomy, Recipe, known_methods
from pruning.engine import Job, Pruned, sweep
from pruning.errors import RecipeError
from pruning.methods import method_named

#: Some that score weights stand for the others; only sparsegpt has no scores to take the mean of.
METHODS = ["wanda-sp", "wanda", "magnitude", "snip"]
AXES = {"kind": ARCHITECTURES, "method": [*METHODS, "random"], "pattern": ["neurons", "heads", "neurons+heads"]}
SPARSITY = 0.5


def dense_recipe(method: str, pattern: str, **more: Any) -> Recipe:
    return Recipe(method=method, sparsity=SPARSITY, pattern=pattern, propagation="dense", **more)


@cache
def swept(kind: str, *, full: bool = False) -> dict[tuple[str, str], Pruned]:
    chosen = product(*AXES.values()) if full else all_pairs(*AXES.values())
    jobs = {key: job(dense_recipe(*key)) for own, *key in chosen if own == kind for key in [tuple(key)]}
    pruned = sweep(Anatomy(tiny_model(kind)), list(jobs.values()), text(), batch_tokens=32)
    return {key: pruned(own) for key, own in jobs.items()}


def pruned_by(kind: str, method: str, pattern: str) -> Pruned:
    results = swept(kind)
    return results[method, pattern] if (method, pattern) in results else swept(kind, full=True)[method, pattern]


def unit_score(anatomy: Anatomy, kind: str, method: str, layer: int, reader: str, unit: Any, inputs: Any) -> float:
    """Return the mean score of a unit's weights; Wanda-sp's of the columns that read it."""
    total, count = 0.0, 0
    seen = all(len(torch.cat(list(inputs[layer, role].values()))) for role, _, _ in unit)
    for role, rows, columns in unit:
        weight = anatomy.weight(layer, role).detach()
        if not seen or method == "magnitude":
            scores = naive.magnitude(weight)
        elif method == "snip":
            scores = naive.snip(derivatives(kind)[0][layer, role], weight)
        elif method == "wanda-sp" and role != reader:
            continue
        else:
            scores = naive.wanda(weight, torch.cat(list(inputs[layer, role].values())))
        mine = scores[rows, columns]
        total, count = total + float(mine.sum()), count + mine.numel()
    return total / count


def naive_masks(
    anatomy: Anatomy, kind: str, method: str, pattern: str, inputs: Any, layers: Any
) -> dict[tuple[int, str], torch.Tensor]:
    masks: dict[tuple[int, str], torch.Tensor] = {}
    for layer in layers:
        for reader, units in naive.units(anatomy, layer, pattern).items():
            scores = [unit_score(anatomy, kind, method, layer, reader, unit, inputs) for unit in units]
            for unit, kept in zip(units, naive.keep_units(scores, SPARSITY), strict=True):
                for role, rows, columns in unit:
                    shape = anatomy.shape(layer, role)
                    masks.setdefault((layer, role), torch.ones(shape, dtype=torch.bool))[rows, columns] &= kept
    return masks


@pairwise(AXES, method=METHODS)
def test_masks_equal_a_naive_float64_version(kind, method, pattern):
    anatomy, inputs = double(kind)
    masks = pruned_by(kind, method, pattern).masks
    expected = naive_masks(anatomy, kind, method, pattern, inputs, range(len(anatomy.blocks)))
    assert set(masks) == set(expected)
    for key in masks:
        assert torch.equal(masks[key], expected[key]), key
    assert masks.sparsity() == SPARSITY  # all counts of these models are even


@pairwise(AXES, method="random")
def test_random_removes_as_much_and_its_seed_decides(kind, pattern):
    masks = pruned_by(kind, "random", pattern).masks
    assert masks.sparsity() == SPARSITY
    others = [Job(dense_recipe("random", pattern, parameters={"seed": seed})) for seed in (0, 1, 2)]
    again = sweep(Anatomy(tiny_model(kind)), others)
    assert again(others[0]).masks == masks
    assert any(again(other).masks != masks for other in others)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mixtral", "mt5"])
def test_pruned_propagation_equals_a_naive_version_that_starts_anew_for_every_block(kind):
    recipe = Recipe(method="wanda-sp", sparsity=SPARSITY)
    masks = sweep(Anatomy(tiny_model(kind)), [job(recipe)], text(), batch_tokens=32)(job(recipe)).masks
    anatomy = Anatomy(double_model(kind))
    for layer in range(len(anatomy.blocks)):
        inputs = catch_inputs(anatomy)
        expected = naive_masks(anatomy, kind, "wanda-sp", recipe.pattern, inputs, [layer])
        for key, mask in expected.items():
            assert torch.equal(masks[key], mask), key
            anatomy.set_weight(*key, anatomy.weight(*key) * mask)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_removed_neurons_and_heads_contribute_nothing(kind):
    """Whatever a removed unit computes: no projection reads it."""
    recipe = Recipe(method="magnitude", sparsity=SPARSITY, pattern="neurons+heads")
    anatomy = Anatomy(tiny_model(kind))
    pruned = sweep(anatomy, [Job(recipe)])(Job(recipe))
    ids = torch.arange(3, 19)[None]
    for key, mask in pruned.masks.items():
        anatomy.set_weight(*key, anatomy.weight(*key) * mask)
    with torch.no_grad():
        expected = run_model(anatomy, ids).logits
        for layer in range(len(anatomy.blocks)):
            for reader in naive.units(anatomy, layer, recipe.pattern):
                columns = ~pruned.masks[layer, reader].any(dim=0)
                assert columns.any()
                if "." not in reader:
                    module = anatomy.model.get_submodule(anatomy.path(layer, reader))
                    module.register_forward_pre_hook(lambda m, x, c=columns: (x[0] + 7.0 * c, *x[1:]))
        assert torch.equal(run_model(anatomy, ids).logits, expected)


@pytest.mark.parametrize("method", ["wanda-sp", "wanda", "magnitude"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "gpt_neox", "phi3", "qwen2_moe"])
def test_a_planted_useless_neuron_and_head_go_first(kind, method):
    anatomy = Anatomy(tiny_model(kind))
    planted: dict[tuple[int, str], list[Any]] = {}
    for layer in range(len(anatomy.blocks)):
        for reader, units in naive.units(anatomy, layer, "neurons+heads").items():
            unit = units[(layer + 1) % len(units)]
            for role, rows, columns in unit:
                weight = anatomy.weight(layer, role).clone()
                weight[rows, columns] *= 1e-4
                anatomy.set_weight(layer, role, weight)
            planted[layer, reader] = unit
    wanted = job(Recipe(method=method, sparsity=SPARSITY, pattern="neurons+heads", propagation="dense"))
    masks = sweep(anatomy, [wanted], text())(wanted).masks
    for (layer, _), unit in planted.items():
        for role, rows, columns in unit:
            assert not masks[layer, role][rows, columns].any(), (layer, role)


def test_heads_that_share_keys_go_as_a_group_and_the_record_says_so():
    anatomy = Anatomy(tiny_model("llama", num_attention_heads=8, num_key_value_heads=4))
    wanted = Job(Recipe(method="magnitude", sparsity=0.3, pattern="heads"))
    result = sweep(anatomy, [wanted])(wanted)
    assert result.remarks == ("whole groups of 2 heads that share keys and values were removed",)
    size = 4
    for layer in range(3):
        queries = result.masks[layer, "q"].all(dim=1).reshape(4, 2 * size)
        keys = result.masks[layer, "k"].all(dim=1).reshape(4, size)
        assert (queries.all(dim=1) == queries.any(dim=1)).all()  # whole groups ...
        assert torch.equal(queries.all(dim=1), keys.all(dim=1))  # ... with their keys
        assert int((~keys.all(dim=1)).sum()) == 1  # 0.3 · 4, at or below
    with pytest.raises(RecipeError, match=r"0\.2 removes none of the 4 groups of 2 heads .* use at least 0\.25"):
        sweep(anatomy, [Job(Recipe(method="magnitude", sparsity=0.2, pattern="heads"))])


def test_heads_that_all_share_one_key_go_one_by_one_and_the_key_stays():
    anatomy = Anatomy(tiny_model("gemma3_text", num_key_value_heads=1))
    wanted = Job(Recipe(method="magnitude", sparsity=0.75, pattern="heads"))
    masks = sweep(anatomy, [wanted])(wanted).masks
    assert {role for _, role in masks} == {"q", "o"}
    assert masks.sparsity() == 0.75


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "wanda-sp", "pattern": "row"}, r'use pattern "neurons\+heads" \(its native one\), not "row"'),
        ({"method": "sparsegpt", "pattern": "heads"}, "sparsegpt chooses single weights"),
        ({"method": "wanda-sp", "roles": ("o",)}, "leave out roles"),
        ({"method": "magnitude", "pattern": "neurons", "allocation": "owl"}, 'allocation "uniform" only, not "owl"'),
        ({"method": "magnitude", "pattern": "neuron"}, 'did you mean "neurons"'),
    ],
)
def test_what_does_not_go_together_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"sparsity": 0.5} | given)


def test_a_share_that_removes_nothing_is_refused_with_the_least_that_does():
    anatomy = Anatomy(tiny_model("gpt2"))
    with pytest.raises(RecipeError, match=r"0\.1 removes none of the 4 heads of block 0 \(o\); use at least 0\.25"):
        sweep(anatomy, [Job(Recipe(method="random", sparsity=0.1, pattern="neurons+heads"))])
    few = Job(Recipe(method="random", sparsity=0.1, pattern="neurons", blocks="1"))
    masks = sweep(anatomy, [few])(few).masks
    assert set(masks) == {(1, "up"), (1, "down")}
    assert masks[1, "up"].all(dim=1).tolist().count(False) == 4  # of 48


def test_every_structured_method_is_tested_here():
    structured = {name for name in known_methods() if method_named(name).scores != "weights"}
    assert structured <= set(AXES["method"])
