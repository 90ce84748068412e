from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from pruning import ROLES, Anatomy, Recipe
from pruning.errors import ModelError, RecipeError
from pruning.sweep import sweep, sweep_work


def naive_wanda(
    model: Any, ids: torch.Tensor, sparsity: float, propagation: str
) -> dict[tuple[int, str], torch.Tensor]:
    """Wanda from the paper in float64: whole forward passes, inputs caught by plain hooks, rows sorted."""
    model = model.double()
    anatomy = Anatomy(model)
    masks: dict[tuple[int, str], torch.Tensor] = {}
    for layer in range(len(anatomy.blocks)):
        inputs: dict[str, torch.Tensor] = {}

        def catch(module, args, role, inputs=inputs):
            inputs[role] = args[0].reshape(-1, args[0].shape[-1])

        handles = [
            anatomy.projection(layer, role).register_forward_pre_hook(partial(catch, role=role)) for role in ROLES
        ]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        for role in ROLES:
            weight = anatomy.weight(layer, role)
            scores = weight.abs() * inputs[role].norm(dim=0)
            order = scores.sort(dim=1, stable=True).indices[:, : math.floor(weight.shape[1] * sparsity)]
            masks[layer, role] = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)
        if propagation == "pruned":
            for role in ROLES:
                anatomy.weight(layer, role).mul_(masks[layer, role])
    return masks


@pytest.mark.parametrize("propagation", ["pruned", "dense"])
def test_wanda_masks_equal_a_naive_float64_version(make_model, architecture, calibration_ids, propagation):
    recipe = Recipe(method="wanda", sparsity=0.5, propagation=propagation)
    masks = sweep(make_model(architecture), [recipe], calibration_ids, batch_tokens=32)[recipe]
    expected = naive_wanda(make_model(architecture), calibration_ids, 0.5, propagation)
    for key, mask in expected.items():
        assert torch.equal(masks[key], mask), key


def test_propagation_makes_a_difference_from_the_second_block_on(model, calibration_ids):
    recipes = [Recipe(method="wanda", sparsity=0.5, propagation=p) for p in ("pruned", "dense")]
    pruned, dense = sweep(model, recipes, calibration_ids).values()
    assert all(torch.equal(pruned[0, role], dense[0, role]) for role in ROLES)
    assert pruned != dense


def test_recipes_in_lockstep_equal_recipes_one_by_one(model, calibration_ids):
    recipes = [
        Recipe(method="wanda", sparsity=0.3),
        Recipe(method="wanda", sparsity=0.6, pattern="matrix"),
        Recipe(method="wanda", sparsity=0.5, propagation="dense"),
        Recipe(method="magnitude", sparsity=0.5),
    ]
    together = sweep(model, recipes, calibration_ids)
    for recipe in recipes:
        assert together[recipe] == sweep(model, [recipe], calibration_ids)[recipe]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("wanda", "row"), ("wanda", "matrix"), ("magnitude", "row"), ("magnitude", "matrix")],
)
def test_sparsity_is_exact_for_every_method_and_pattern(make_model, architecture, calibration_ids, method, pattern):
    recipe = Recipe(method=method, sparsity=0.25, pattern=pattern)
    masks = sweep(make_model(architecture), [recipe], calibration_ids)[recipe]
    assert all(masks.sparsity(key) == 0.25 for key in masks)  # 32 and 48 inputs divide by four
    if pattern == "row":
        assert all(bool((masks[key].sum(dim=1) * 4 == masks[key].shape[1] * 3).all()) for key in masks)


def test_row_sparsity_is_exact_when_scores_tie(model, calibration_ids):
    anatomy = Anatomy(model)
    for key in anatomy:
        anatomy.weight(*key).fill_(0.01)
    recipe = Recipe(method="wanda", sparsity=0.5)
    masks = sweep(model, [recipe], calibration_ids)[recipe]
    assert all(bool((masks[key].sum(dim=1) * 2 == masks[key].shape[1]).all()) for key in masks)


def test_the_model_is_unchanged_afterwards_bit_for_bit(make_model, architecture, calibration_ids):
    model = make_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sweep(model, [Recipe(method="wanda", sparsity=0.5)], calibration_ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_embeddings_and_head_are_never_pruned(make_model, architecture, calibration_ids):
    model = make_model(architecture)
    recipe = Recipe(method="magnitude", sparsity=0.5)
    masks = sweep(model, [recipe])[recipe]
    assert {role for _, role in masks} == set(ROLES)


def test_batch_size_does_not_change_the_masks(model, calibration_ids):
    recipe = Recipe(method="wanda", sparsity=0.5)
    small, large = (sweep(model, [recipe], calibration_ids, batch_tokens=n)[recipe] for n in (16, 1000))
    assert small == large


@pytest.mark.parametrize("propagations", [["pruned"], ["dense"], ["pruned", "dense", "pruned"]])
def test_work_foretold_is_work_done(model, calibration_ids, propagations):
    recipes = [Recipe(method="wanda", sparsity=0.2 + i / 10, propagation=p) for i, p in enumerate(propagations)]
    done: list[int] = []
    sweep(model, recipes, calibration_ids, progress=done.append)
    assert sum(done) == sweep_work(Anatomy(model), recipes, calibration_ids.numel())


def test_a_method_that_needs_text_says_so(model):
    with pytest.raises(RecipeError, match="wanda needs calibration text"):
        sweep(model, [Recipe(method="wanda", sparsity=0.5)])


def test_nan_weights_are_refused_with_their_place(model):
    Anatomy(model).weight(1, "up")[3, 4] = torch.nan
    with pytest.raises(ModelError, match="block 1, role up"):
        sweep(model, [Recipe(method="magnitude", sparsity=0.5)])
