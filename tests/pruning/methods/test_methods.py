"""Every method and pattern on every architecture, against naive float64 versions written from the papers."""

from __future__ import annotations

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
from pruning.methods import method_named
from pruning.models.anatomy import role_kind

PATTERNS = ["row", "matrix", "model", "2:4", "4:8"]
METHODS = ["magnitude", "wanda", "ria", "m-wanda", "snip", "grasp", "gblm"]
#: Those that read the inputs of a projection, and those that differentiate the loss.
READ, DIFFERENTIATE = ("wanda", "ria", "m-wanda", "gblm"), ("snip", "grasp", "gblm")
AXES = {"kind": ARCHITECTURES, "method": [*METHODS, "sparsegpt", "random"], "pattern": PATTERNS}
#: What may follow the choice of a mask.
STEPS: dict[str, dict[str, Any]] = {
    "swaps": {"refinement": "swaps", "parameters": {"swaps": 1000}},
    "admm": {"correction": "admm"},
    "least-squares": {"correction": "least-squares"},
    "swaps+admm": {"refinement": "swaps", "correction": "admm"},
}
FOLLOWED = {"kind": ARCHITECTURES, "method": ["wanda", "magnitude", "snip"], "pattern": PATTERNS, "steps": list(STEPS)}
#: What SparseGPT must do better than.
RIVALS = ["wanda", "magnitude"]


def dense_recipe(method: str, pattern: str, **more: Any) -> Recipe:
    if method == "m-wanda":
        more = {"parameters": {"firing": 1.0}, **more}  # with all of its terms
    return Recipe(method=method, sparsity=0.5, pattern=pattern, allocation="uniform", propagation="dense", **more)


@cache
def swept(kind: str, *, full: bool = False) -> tuple[Anatomy, dict[tuple[str, str], Pruned]]:
    """Return the results of the methods and patterns that are tested, or of all, with dense propagation, in one sweep."""
    chosen = product(*AXES.values()) if full else all_pairs(*AXES.values())
    asked = [(method, pattern) for own, method, pattern in chosen if own == kind]
    beside = [(rival, pattern) for method, pattern in asked if method == "sparsegpt" for rival in RIVALS]
    jobs = {key: job(dense_recipe(*key)) for key in [*asked, *beside]}
    anatomy = Anatomy(tiny_model(kind))
    pruned = sweep(anatomy, list(jobs.values()), text(), batch_tokens=32)
    return anatomy, {key: pruned(own) for key, own in jobs.items()}


def pruned_by(kind: str, method: str, pattern: str) -> Pruned:
    _, results = swept(kind)
    return results[method, pattern] if (method, pattern) in results else swept(kind, full=True)[1][method, pattern]


@cache
def sequence_gradients(kind: str) -> dict[tuple[int, str], list[torch.Tensor]]:
    """Return the gradient of every sequence's own mean token loss, one backward pass each."""
    anatomy, _ = double(kind)
    parameters = anatomy.block_parameters()
    found: dict[tuple[int, str], list[torch.Tensor]] = {key: [] for key in anatomy}
    for row in torch.cat(list(tokens().values())):
        if anatomy.encoder_decoder:
            loss = run_model(anatomy, row[None]).loss
        else:
            loss = torch.nn.functional.cross_entropy(run_model(anatomy, row[None]).logits[0, :-1], row[1:])
        parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for key, part in anatomy.by_projection(dict(zip(parameters, parts, strict=True))).items():
            found[key].append(part)
    return found


@cache
def naive_scores(kind: str, method: str) -> dict[tuple[int, str], torch.Tensor]:
    anatomy, inputs = double(kind)
    scores = {}
    for key in anatomy:
        weight, by_language = anatomy.weight(*key).detach(), inputs[key]
        if (method in READ and sum(map(len, by_language.values())) == 0) or method == "magnitude":
            scores[key] = naive.magnitude(weight)
        elif method in ("wanda", "ria"):
            score = naive.wanda if method == "wanda" else naive.ria
            scores[key] = score(weight, torch.cat(list(by_language.values())))
        elif method == "m-wanda":
            scores[key] = naive.m_wanda(weight, {lang: x for lang, x in by_language.items() if len(x)})
        elif method == "gblm":
            scores[key] = naive.gblm(weight, torch.cat(list(by_language.values())), sequence_gradients(kind)[key])
        elif method == "snip":
            scores[key] = naive.snip(derivatives(kind)[0][key], weight)
        else:
            scores[key] = naive.grasp(weight, derivatives(kind)[1][key])
    return scores


def naive_masks(kind: str, method: str, pattern: str) -> dict[tuple[int, str], torch.Tensor]:
    scores = naive_scores(kind, method)
    if pattern == "model":
        _, inputs = double(kind)
        seen = {
            key: score for key, score in scores.items() if method not in READ or sum(map(len, inputs[key].values()))
        }
        kept = naive.keep_model({f"{key}": score for key, score in seen.items()}, 0.5)
        apart = {key: naive.keep_matrix(score, 0.5) for key, score in scores.items() if key not in seen}
        return {key: kept[f"{key}"] for key in seen} | apart
    if pattern in ("row", "matrix"):
        keep = naive.keep_row if pattern == "row" else naive.keep_matrix
        return {key: keep(score, 0.5) for key, score in scores.items()}
    n, m = map(int, pattern.split(":"))
    return {key: naive.keep_n_m(score, n, m) for key, score in scores.items()}


@pairwise(AXES, method=METHODS)
def test_masks_equal_a_naive_float64_version(kind, method, pattern):
    anatomy, _ = swept(kind)
    masks = pruned_by(kind, method, pattern).masks
    expected = naive_masks(kind, method, pattern)
    assert set(masks) == set(anatomy) == set(expected)
    differing = sum(int((masks[key] != expected[key]).sum()) for key in masks)
    total = sum(mask.numel() for mask in expected.values())
    # Scores that differ by less than float32 can tell may change places; derivatives sum up more rounding.
    assert differing <= (2e-3 if method in DIFFERENTIATE else 2e-4) * total
    assert masks.kept() * 2 == total


@pairwise(AXES, method="sparsegpt")
def test_sparsegpt_reconstructs_as_well_as_the_published_algorithm_and_better_than_others(kind, pattern):
    anatomy, _ = swept(kind)
    _, inputs = double(kind)
    pruned = pruned_by(kind, "sparsegpt", pattern)
    errors = dict.fromkeys(("ours", "published", *RIVALS), 0.0)
    for key in anatomy:
        dense = anatomy.weight(*key)
        mask = pruned.masks[key]
        weight = torch.zeros_like(dense)
        if pruned.values is None or key not in pruned.values:  # an expert that no token was sent to
            continue
        weight[mask] = pruned.values[key]
        x = torch.cat(list(inputs[key].values()))
        errors["ours"] += naive.reconstruction_error(dense, weight, x)
        if pattern == "model":  # how much a matrix gives depends on all of them; the choice within it does not
            share = float((~mask).sum()) / mask.numel()
            _, published = naive.sparsegpt(dense, x, share, "matrix")
        elif ":" in pattern:
            n, m = map(int, pattern.split(":"))
            _, published = naive.sparsegpt(dense, x, None, (n, m))
        else:
            _, published = naive.sparsegpt(dense, x, 0.5, pattern)
        errors["published"] += naive.reconstruction_error(dense, published, x)
        for other in RIVALS:
            kept = pruned_by(kind, other, pattern).masks[key]
            errors[other] += naive.reconstruction_error(dense, dense * kept, x)
    assert errors["ours"] == pytest.approx(errors["published"], rel=0.01)
    assert errors["ours"] < errors["wanda"]
    assert errors["ours"] < errors["magnitude"]
    assert pruned.masks.kept() * 2 == sum(mask.numel() for mask in pruned.masks.values())


@pairwise(AXES, method="random")
def test_random_is_exact_and_its_seed_decides(kind, pattern):
    anatomy, _ = swept(kind)
    masks = pruned_by(kind, "random", pattern).masks
    assert masks.kept() * 2 == sum(mask.numel() for mask in masks.values())
    recipes = [dense_recipe("random", pattern, parameters={"seed": seed}) for seed in (0, 1)]
    again = sweep(anatomy, [Job(recipe) for recipe in recipes])
    assert again(Job(recipes[0])).masks == masks
    other = again(Job(recipes[1])).masks
    overlap = sum((masks[key] & other[key]).sum() for key in masks) / masks.kept()
    assert abs(float(overlap) - 0.5) < 0.03


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_pruned_propagation_equals_a_naive_version_that_starts_anew_for_every_block(kind):
    recipe = Recipe(method="wanda", sparsity=0.5)
    masks = sweep(Anatomy(tiny_model(kind)), [job(recipe)], text(), batch_tokens=32)(job(recipe)).masks
    anatomy = Anatomy(double_model(kind))
    for layer in range(len(anatomy.blocks)):
        inputs = catch_inputs(anatomy)
        for role in anatomy.roles(layer):
            rows = torch.cat(list(inputs[layer, role].values()))
            weight = anatomy.weight(layer, role)
            scores = naive.wanda(weight, rows) if len(rows) else naive.magnitude(weight)
            expected = naive.keep_row(scores, 0.5)
            assert int((masks[layer, role] != expected).sum()) <= 2e-4 * expected.numel(), (layer, role)
        for role in anatomy.roles(layer):
            anatomy.set_weight(layer, role, anatomy.weight(layer, role) * masks[layer, role])


@pytest.mark.parametrize("kind", ["llama", "bloom", "mt5"])
def test_gblm_has_inputs_of_the_pruned_model_and_gradients_of_the_dense_one(kind):
    recipe = Recipe(method="gblm", sparsity=0.5, parameters={"slope": 300})
    assert recipe.propagation == "pruned"
    masks = sweep(Anatomy(tiny_model(kind)), [job(recipe)], text(), batch_tokens=32)(job(recipe)).masks
    anatomy = Anatomy(double_model(kind))
    slopes = sequence_gradients(kind)
    for layer in range(len(anatomy.blocks)):
        inputs = catch_inputs(anatomy)
        for role in anatomy.roles(layer):
            rows = torch.cat(list(inputs[layer, role].values()))
            scores = naive.gblm(anatomy.weight(layer, role), rows, slopes[layer, role], 300)
            expected = naive.keep_row(scores, 0.5)
            assert int((masks[layer, role] != expected).sum()) <= 2e-3 * expected.numel(), (layer, role)
        for role in anatomy.roles(layer):
            anatomy.set_weight(layer, role, anatomy.weight(layer, role) * masks[layer, role])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_wanda_refined_by_dsnot_equals_a_naive_version(kind):
    recipe = Recipe(method="wanda", sparsity=0.5, refinement="dsnot", propagation="dense")
    masks = sweep(Anatomy(tiny_model(kind)), [job(recipe)], text(), batch_tokens=32)(job(recipe)).masks
    anatomy, inputs = double(kind)
    differing = moved = rows = 0
    for key in anatomy:
        x, weight = torch.cat(list(inputs[key].values())), anatomy.weight(*key)
        before = naive.keep_row(naive.wanda(weight, x) if len(x) else naive.magnitude(weight), 0.5)
        expected = naive.dsnot(weight, x, before) if len(x) else before
        differing += int((masks[key] != expected).any(dim=1).sum())
        moved += int((expected != before).any(dim=1).sum())
        rows += len(weight)
        assert torch.equal(masks[key].sum(dim=1), before.sum(dim=1))
    assert differing <= 0.01 * rows  # one choice that rounding turns changes all that follow in its row
    assert moved > 0.5 * rows


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mixtral", "mt5"])
def test_sparsegpt_passes_corrected_weights_on_to_the_next_block(kind):
    recipe = Recipe(method="sparsegpt", sparsity=0.5)
    anatomy = Anatomy(tiny_model(kind))
    pruned = sweep(anatomy, [job(recipe)], text(), batch_tokens=32)(job(recipe))
    reference = Anatomy(double_model(kind))
    assert pruned.values is not None
    for layer in range(len(reference.blocks)):
        inputs = catch_inputs(reference)
        new = {}
        for role in reference.roles(layer):
            dense, rows = reference.weight(layer, role), torch.cat(list(inputs[layer, role].values()))
            weight = dense * pruned.masks[layer, role]
            if (layer, role) in pruned.values:
                weight[pruned.masks[layer, role]] = pruned.values[layer, role].double()
                _, published = naive.sparsegpt(dense, rows, 0.5)
                ours = naive.reconstruction_error(dense, weight, rows)
                assert ours == pytest.approx(naive.reconstruction_error(dense, published, rows), rel=0.05), (
                    layer,
                    role,
                )
            new[role] = weight
        for role, weight in new.items():
            reference.set_weight(layer, role, weight)


@cache
def followed(kind: str, *, full: bool = False) -> tuple[Anatomy, dict[tuple[str, str, str], Pruned]]:
    """Return the results with each refinement and correction that is tested, and without (""), in one sweep."""
    chosen = product(*FOLLOWED.values()) if full else all_pairs(*FOLLOWED.values())
    asked = [(method, pattern, steps) for own, method, pattern, steps in chosen if own == kind]
    asked += [(method, pattern, "") for method, pattern, _ in asked]
    jobs = {
        (method, pattern, steps): job(dense_recipe(method, pattern, **STEPS.get(steps, {})))
        for method, pattern, steps in asked
    }
    anatomy = Anatomy(tiny_model(kind))
    pruned = sweep(anatomy, list(jobs.values()), text(), batch_tokens=32)
    return anatomy, {key: pruned(own) for key, own in jobs.items()}


def best_swap(dense: torch.Tensor, mask: torch.Tensor, x: torch.Tensor, m: int) -> torch.Tensor:
    """Return the change of each row's error by the best of all swaps (within groups of m, unless that is 0), relative."""
    w, gram = dense.double(), x.T @ x
    c = (w * ~mask) @ gram
    pruning = (2 * w * c + w**2 * gram.diagonal()).masked_fill(~mask, torch.inf)
    reviving = (-2 * w * c + w**2 * gram.diagonal()).masked_fill(mask, torch.inf)
    pairs = pruning[:, :, None] + reviving[:, None, :] - 2 * w[:, :, None] * w[:, None, :] * gram
    if m:
        group = torch.arange(len(gram)) // m
        pairs = pairs.masked_fill(group[:, None] != group[None, :], torch.inf)
    return pairs.flatten(1).amin(dim=1) / (c * w * ~mask).sum(dim=1).clamp_min(1e-30)


@pairwise(FOLLOWED)
def test_refinements_and_corrections_after_any_mask_equal_naive_float64_versions(kind, method, pattern, steps):
    wanted, base = (method, pattern, steps), (method, pattern, "")
    anatomy, results = followed(kind)
    if wanted not in results:
        anatomy, results = followed(kind, full=True)
    _, inputs = double(kind)
    pruned, start = results[wanted], results[base].masks
    group = int(pattern.split(":")[1]) if ":" in pattern else 0
    seen = [key for key in anatomy if sum(map(len, inputs[key].values()))]
    for key in anatomy:
        dense, mask = anatomy.weight(*key), pruned.masks[key]
        x = torch.cat(list(inputs[key].values()))
        before = naive.reconstruction_error(dense, dense * start[key], x)
        swapped = naive.reconstruction_error(dense, dense * mask, x)
        if "swaps" not in steps or key not in seen:
            assert torch.equal(mask, start[key])
        else:
            shape = (len(mask), -1, group or mask.shape[1])
            assert torch.equal(mask.reshape(shape).sum(dim=2), start[key].reshape(shape).sum(dim=2))
            assert swapped <= before * (1 + 1e-5)
        if steps == "swaps" and key in seen:
            assert float(best_swap(dense, mask, x, group).amin()) > -1e-4
        assert (key in pruned.values) == (steps != "swaps" and key in seen)
        if key in pruned.values:
            new = torch.zeros_like(dense)
            new[mask] = pruned.values[key]
            error = naive.reconstruction_error(dense, new, x)
            slow = naive.least_squares if steps == "least-squares" else naive.admm
            expected = naive.reconstruction_error(dense, slow(dense, mask, x), x)
            assert error == pytest.approx(expected, rel=2e-3, abs=1e-4 * swapped)
            assert error <= swapped * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "mt5"])
@pytest.mark.parametrize("pattern", ["matrix", "2:4"])
def test_a_correction_on_a_mask_of_sparsegpt_starts_from_dense_weights(kind, pattern):
    recipes = [dense_recipe("sparsegpt", pattern, **more) for more in ({}, STEPS["least-squares"], STEPS["admm"])]
    anatomy = Anatomy(tiny_model(kind))
    pruned = sweep(anatomy, [job(recipe) for recipe in recipes], text(), batch_tokens=32)
    updated, exact, admm = (pruned(job(recipe)) for recipe in recipes)
    assert exact.masks == admm.masks == updated.masks
    _, inputs = double(kind)
    for key, values in exact.values.items():
        dense, mask = anatomy.weight(*key), exact.masks[key]
        x = torch.cat(list(inputs[key].values()))
        errors = []
        for found in (values, admm.values[key], updated.values[key]):
            new = torch.zeros_like(dense)
            new[mask] = found
            errors.append(naive.reconstruction_error(dense, new, x))
        best = naive.reconstruction_error(dense, naive.least_squares(dense, mask, x), x)
        assert errors[0] == pytest.approx(best, rel=2e-3, abs=1e-4 * errors[2])
        assert errors[0] <= min(errors[1:]) * (1 + 1e-3)


def test_every_registered_method_is_tested_here():
    structured = {name for name in known_methods() if method_named(name).scores != "weights"}  # see test_structured
    quantizing = {name for name in known_methods() if method_named(name).quantize}  # see test_quantizing
    assert set(known_methods()) - structured - quantizing == set(AXES["method"])
    assert quantizing == {"rtn", "gptq", "awq"}


def test_experts_that_see_nothing_are_reported_and_fall_back_on_magnitude():
    anatomy = Anatomy(tiny_model("mixtral"))
    router = anatomy.module(0, "mlp.gate")
    with torch.no_grad():
        router.weight[3] = -100 * router.weight[:3].abs().sum(dim=0)  # the last choice of any token ...
        router.weight[:3].abs_()
        anatomy.model.model.embed_tokens.weight.abs_()  # ... whose states are positive
        anatomy.model.model.layers[0].post_attention_layernorm.weight.abs_()
        anatomy.weight(0, "o").zero_()
    recipes = [Recipe(method=method, sparsity=0.5, pattern="row") for method in ("wanda", "sparsegpt")]
    pruned = sweep(anatomy, [job(recipe) for recipe in recipes], text())
    corrected = Recipe(method="magnitude", sparsity=0.5, refinement="swaps", correction="admm")
    result = sweep(anatomy, [job(corrected)], text())(job(corrected))
    assert "block 0, gate.3 and up.3: no calibration token reached them; no swaps, no admm" in result.remarks
    assert (0, "up.3") not in result.values
    assert (0, "up.2") in result.values
    for recipe in recipes:
        result = pruned(job(recipe))
        assert "block 0, gate.3 and up.3: no calibration token reached them; pruned by magnitude" in result.remarks
        expected = naive.keep_row(naive.magnitude(anatomy.weight(0, "up.3")), 0.5)
        assert torch.equal(result.masks[0, "up.3"], expected)
        assert (0, "up.3") not in (result.values or {})


def test_a_dead_input_loses_its_weights_first_and_damping_is_raised_only_when_needed():
    from pruning.methods import sparsegpt
    from pruning.patterns import pattern_named
    from pruning.statistics import InputStatistics, Statistics

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 24, generator=generator)
    x[:, 5] = 0
    x[:, 6] = x[:, 7]
    weight = torch.randn(16, 24, generator=generator)
    inputs = InputStatistics(24, frozenset({"gram"}))
    inputs.add(x)
    solved = sparsegpt.solve([weight], Statistics(inputs), pattern_named("matrix"), [192])
    assert not solved.masks[0][:, 5].any()
    assert solved.remarks == ()
    spoilt = InputStatistics(24, frozenset({"gram"}))
    spoilt.add(x)
    spoilt._panels[0, 1] = spoilt._panels[1, 0] = 3 * float(spoilt._panels[0, 0])  # no longer positive definite
    solved = sparsegpt.solve([weight], Statistics(spoilt), pattern_named("matrix"), [192])
    assert "damping raised from 0.01 to" in solved.remarks[0]
    assert int((~solved.masks[0]).sum()) == 192


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_corrected_weights_are_zero_where_removed_and_have_the_models_dtype(kind):
    anatomy, results = swept(kind)
    corrected = [pruned for (method, _), pruned in results.items() if method == "sparsegpt"]
    assert corrected
    for pruned in corrected:
        assert pruned.values is not None
        for key, values in pruned.values.items():
            assert values.dtype == anatomy.weight(*key).dtype
            assert len(values) == pruned.masks.kept(key)
        kinds = {role_kind(role) for _, role in pruned.values}
        assert kinds == {role_kind(role) for _, role in anatomy}
