"""Methods that remove whole neurons and heads, on every architecture, against naive float64 versions."""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from typing import Any

import naive
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from pairwise import all_pairs, pairwise
from reference import catch_inputs, derivatives, double, double_model, job, run_model, text, tokens

from pruning import Anatomy, Recipe, known_methods
from pruning.engine import Job, Pruned, sweep
from pruning.errors import ModelError, RecipeError
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
    assert result.remarks == ("1 of 4 groups of 2 heads that share keys and values removed (inputs of o)",)
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
        ({"method": "flap", "pattern": "2:4"}, r'use pattern "neurons\+heads" \(its native one\), not "2:4"'),
        ({"method": "sparsegpt", "pattern": "heads"}, "sparsegpt chooses single weights"),
        ({"method": "wanda-sp", "roles": ("o",)}, "leave out roles"),
        (
            {"method": "magnitude", "pattern": "neurons", "allocation": "owl"},
            'allocation "uniform" or "standardized", not "owl"',
        ),
        ({"method": "wanda", "allocation": "standardized"}, r'use pattern "neurons\+heads"'),
        ({"method": "wanda", "allocation": "standardized", "pattern": "model"}, r'use pattern "neurons\+heads"'),
        ({"method": "flap", "pattern": "blocks"}, r'flap has no scores for pattern "blocks"; use "neurons\+heads"'),
        ({"method": "block-influence", "pattern": "heads"}, 'no scores for pattern "heads"; use "blocks"'),
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


def flap_by_hand(kind: str, sparsity: float) -> tuple[dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    """Return FLAP's masks and biases: one threshold over the z-scores of everything, at the price of real weights."""
    anatomy, inputs = double(kind)
    every, total = [], 0
    masks: dict[Any, torch.Tensor] = {}
    for layer in range(len(anatomy.blocks)):
        for reader, units in naive.units(anatomy, layer, "neurons+heads").items():
            rows = torch.cat(list(inputs[layer, reader].values()))
            assert len(rows)
            z = naive.z_scores(naive.flap(anatomy.weight(layer, reader), rows))
            for unit in units:
                columns = next(columns for role, _, columns in unit if role == reader)
                cost = sum(anatomy.weight(layer, role)[r, c].numel() for role, r, c in unit)
                every.append((float(z[columns].mean()), layer, reader, unit, cost))
                total += cost
                for role, _, _ in unit:
                    masks[layer, role] = torch.ones(anatomy.shape(layer, role), dtype=torch.bool)
    biases: dict[Any, torch.Tensor] = {}
    left = int(total * sparsity)
    for _, layer, reader, unit, cost in sorted(every, key=lambda entry: entry[0]):
        if cost > left:
            break
        left -= cost
        for role, r, c in unit:
            masks[layer, role][r, c] = False
            if role == reader and "." not in reader:
                mean = torch.cat(list(inputs[layer, reader].values())).mean(dim=0)
                added = anatomy.weight(layer, reader)[:, c] @ mean[c]
                biases[layer, reader] = biases.get((layer, reader), torch.zeros(len(added)).double()) + added
    for key in biases:
        bias = anatomy.bias(*key)
        biases[key] = biases[key] + (0 if bias is None else bias)
    return masks, biases


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in ("mixtral", "qwen3_moe")])
def test_flap_equals_a_naive_float64_version(kind):
    wanted = job(Recipe(method="flap", sparsity=SPARSITY))
    assert (wanted.recipe.allocation, wanted.recipe.propagation) == ("standardized", "dense")
    result = sweep(Anatomy(tiny_model(kind)), [wanted], text(), batch_tokens=32)(wanted)
    masks, biases = flap_by_hand(kind, SPARSITY)
    assert set(result.masks) == set(masks)
    for key, mask in masks.items():
        assert torch.equal(result.masks[key], mask), key
    readers = {key: bias for key, bias in result.biases.items() if key in biases}
    assert set(readers) == set(biases)
    for key, bias in biases.items():
        assert torch.allclose(readers[key].double(), bias, atol=1e-6, rtol=1e-4), key
    silent = result.biases.keys() - biases.keys()  # of what computes the removed units
    assert {role.rpartition("_")[2] for _, role in silent} <= {"q", "k", "v", "gate", "up"}
    assert SPARSITY - 0.05 < result.masks.sparsity() <= SPARSITY  # a head of these models has up to 0.04 of the weights


def test_flap_without_compensation_and_with_uniform_allocation():
    anatomy = Anatomy(tiny_model())
    wanted = job(Recipe(method="flap", sparsity=SPARSITY, allocation="uniform", parameters={"bias": 0}))
    result = sweep(anatomy, [wanted], text())(wanted)
    assert not result.biases
    assert all(result.masks.sparsity(key) == SPARSITY for key in result.masks)


def test_one_threshold_needs_no_head_in_every_block():
    anatomy = Anatomy(tiny_model())  # with two groups of heads in a block, of which 0.1 is none
    wanted = job(Recipe(method="flap", sparsity=0.1))
    result = sweep(anatomy, [wanted], text())(wanted)
    assert 0.09 < result.masks.sparsity() <= 0.1
    none = job(Recipe(method="flap", sparsity=1e-4))
    with pytest.raises(ModelError, match=r"0\.0001 removes no neurons and no heads; raise it"):
        sweep(anatomy, [none], text())(none)


def test_experts_without_tokens_and_flap_go_together():
    anatomy = Anatomy(tiny_model("mixtral"))
    wanted = job(Recipe(method="flap", sparsity=SPARSITY))
    result = sweep(anatomy, [wanted], text())(wanted)
    assert {role for _, role in result.biases} == {"o"}
    assert "experts have no biases that could make up for removed neurons" in result.remarks
    assert SPARSITY - 0.01 < result.masks.sparsity() <= SPARSITY


def test_a_bias_makes_up_for_inputs_that_never_change():
    """A neuron whose value is constant is replaced by a bias without any error."""
    anatomy = Anatomy(tiny_model("gpt2"))
    model: Any = anatomy.model
    for layer in range(3):
        weight = anatomy.weight(layer, "up").clone()
        weight[:24] = 0
        anatomy.set_weight(layer, "up", weight)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = model(ids).logits
    wanted = job(Recipe(method="flap", sparsity=SPARSITY, pattern="neurons", allocation="uniform"))
    result = sweep(anatomy, [wanted], text())(wanted)
    assert all(not result.masks[layer, "up"][:24].any() for layer in range(3))
    for key in result.masks:
        anatomy.set_weight(*key, anatomy.weight(*key) * result.masks[key])
    for key, bias in result.biases.items():
        anatomy.set_bias(*key, bias)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)


# Blocks


def influences(kind: str) -> list[float]:
    anatomy, _ = double(kind)
    states: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def keep(layer: int, before: Any, after: Any) -> None:
        after = after[0] if isinstance(after, tuple) else after
        own = states.setdefault(layer, ([], []))
        own[0].append(before.flatten(0, -2))
        own[1].append(after.flatten(0, -2))

    handles = [
        block.register_forward_hook(
            lambda m, args, kwargs, out, layer=layer: keep(layer, args[0] if args else kwargs["hidden_states"], out),
            with_kwargs=True,
        )
        for layer, block in enumerate(anatomy.blocks)
    ]
    with torch.no_grad():
        for ids in tokens().values():
            for row in ids:
                run_model(anatomy, row[None])
    for handle in handles:
        handle.remove()
    return [naive.block_influence(*map(torch.cat, states[layer])) for layer in range(len(anatomy.blocks))]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_blocks_that_turn_the_states_least_go(kind):
    wanted = job(Recipe(method="block-influence", sparsity=0.67))
    anatomy = Anatomy(tiny_model(kind))
    result = sweep(anatomy, [wanted], text(), batch_tokens=32)(wanted)
    gone = {layer for layer, _ in result.masks if not result.masks.kept((layer, anatomy.roles(layer)[0]))}
    found = influences(kind)
    sizes = [sum(torch.tensor(anatomy.shape(n, r)).prod() for r in anatomy.roles(n)) for n in range(len(found))]
    expected: set[int] = set()
    left = int(0.67 * float(sum(sizes)))
    for layer in sorted(range(len(found)), key=found.__getitem__):
        if sizes[layer] > left:
            break
        stack = anatomy.stack_of(layer)
        if {*range(stack.first, stack.stop)} - expected != {layer}:
            expected.add(layer)
            left -= int(sizes[layer])
    assert gone == expected
    assert gone
    for layer, role in anatomy:
        assert result.masks.kept((layer, role)) == (0 if layer in gone else sizes_of(anatomy, layer, role))
    said = {int(layer): float(score) for layer, score in re.findall(r"(\d+) \(([^)]+)\)", result.remarks[0])}
    assert said == pytest.approx({layer: found[layer] for layer in gone}, rel=1e-2)


def sizes_of(anatomy: Anatomy, layer: int, role: str) -> int:
    outputs, inputs = anatomy.shape(layer, role)
    return outputs * inputs


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", ["block-influence", "magnitude"])
def test_a_removed_block_passes_its_input_on_unchanged(kind, method):
    """Whatever norms it has before and after what it adds, and whatever biases."""
    anatomy = Anatomy(tiny_model(kind))
    wanted = job(Recipe(method=method, sparsity=0.67, pattern="blocks"))
    result = sweep(anatomy, [wanted], text())(wanted)
    gone = {layer for layer, _ in result.masks if not result.masks.kept((layer, anatomy.roles(layer)[0]))}
    for key in result.masks:
        anatomy.set_weight(*key, anatomy.weight(*key) * result.masks[key])
    for key, bias in result.biases.items():
        anatomy.set_bias(*key, bias)
    passed: list[int] = []

    def same(layer: int, before: torch.Tensor, after: Any) -> None:
        assert torch.equal(before, after[0] if isinstance(after, tuple) else after), layer
        passed.append(layer)

    for layer in gone:
        anatomy.blocks[layer].register_forward_hook(
            lambda m, args, kwargs, out, layer=layer: same(layer, args[0] if args else kwargs["hidden_states"], out),
            with_kwargs=True,
        )
    with torch.no_grad():
        run_model(anatomy, torch.arange(3, 19)[None])
    assert sorted(passed) == sorted(gone)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "gpt_neox", "mixtral"])
def test_a_planted_useless_block_goes_first(kind):
    anatomy = Anatomy(tiny_model(kind))
    for role in anatomy.roles(1):
        anatomy.set_weight(1, role, anatomy.weight(1, role) * 1e-3)
    for role in ("o", "down"):
        bias = anatomy.bias(1, role) if role in anatomy.roles(1) else None
        if bias is not None:
            anatomy.set_bias(1, role, bias * 0)
    if kind == "gemma2":  # whose norm after the block would blow it up again
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            anatomy.module(1, name).weight.data.fill_(-1)
    for method in ("block-influence", "magnitude"):
        wanted = job(Recipe(method=method, sparsity=0.4, pattern="blocks"))
        masks = sweep(anatomy, [wanted], text())(wanted).masks
        assert {layer for layer, _ in masks if not masks.kept((layer, "o"))} == {1}, method


def test_the_last_blocks_states_are_those_before_the_final_norm():
    anatomy = Anatomy(tiny_model())
    for role in anatomy.roles(2):
        anatomy.set_weight(2, role, anatomy.weight(2, role) * 1e-3)
    torch.nn.init.normal_(anatomy.model.model.norm.weight)  # turns them, after any block
    wanted = job(Recipe(method="block-influence", sparsity=0.4))
    masks = sweep(anatomy, [wanted], text())(wanted).masks
    assert not masks.kept((2, "o"))


def test_blocks_that_normalise_the_residual_stream_cannot_be_removed():
    anatomy = Anatomy(tiny_model("opt", do_layer_norm_before=False, word_embed_proj_dim=16))
    with pytest.raises(RecipeError, match=r'more than add to the residual stream.*use pattern "neurons'):
        sweep(anatomy, [Job(Recipe(method="magnitude", sparsity=0.4, pattern="blocks"))])


def test_too_small_a_share_of_blocks_is_refused():
    with pytest.raises(RecipeError, match=r"0\.3 removes none of 3 blocks; use at least 0\.3334"):
        sweep(Anatomy(tiny_model()), [job(Recipe(method="magnitude", sparsity=0.3, pattern="blocks"))])
    with pytest.raises(RecipeError, match=r"removes none of 1 blocks; widen the range of blocks"):
        sweep(Anatomy(tiny_model()), [job(Recipe(method="magnitude", sparsity=0.3, pattern="blocks", blocks="1"))])


def test_every_structured_method_is_tested_here():
    structured = {name for name in known_methods() if method_named(name).scores != "weights"}
    assert structured == {"wanda-sp", "flap", "block-influence"}
