"""Every quantizing method on every architecture, against naive float64 versions written from the papers."""

from __future__ import annotations

from functools import cache
from math import isclose

import naive
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from pairwise import all_pairs, pairwise
from reference import Inputs, catch_inputs, double, double_model, job, text

from pruning import Anatomy, Recipe
from pruning.engine import Pruned, sweep
from pruning.methods import awq, columns, gptq, rtn, sparsegpt
from pruning.patterns import pattern_named
from pruning.quantization import Grid
from pruning.statistics import ABSOLUTE, GRAM, InputStatistics, Statistics

AXES = {
    "kind": ARCHITECTURES,
    "method": ["rtn", "gptq", "gptq-order", "gptq-static", "awq"],
    "bits": [8, 4, 3, 2],
    "group": [0, 8],
    "symmetric": [0, 1],
}
Case = tuple[str, int, int, int]


def recipe_of(anatomy: Anatomy, method: str, bits: int, group: int, symmetric: int) -> Recipe:
    """Return a recipe for the last block, which has experts if any block does."""
    name, _, switch = method.partition("-")
    parameters = {"symmetric": symmetric} | ({switch: 1} if switch else {})
    last = f"{len(anatomy.blocks) - 1}"
    return Recipe(method=name, bits=bits, group=group, propagation="dense", parameters=parameters, blocks=last)


@cache
def swept(kind: str) -> tuple[Anatomy, dict[Case, Pruned]]:
    anatomy = Anatomy(tiny_model(kind))
    jobs = {case[1:]: job(recipe_of(anatomy, *case[1:])) for case in all_pairs(*AXES.values()) if case[0] == kind}
    done = sweep(anatomy, list(jobs.values()), text(), batch_tokens=32)
    return anatomy, {case: done(own) for case, own in jobs.items()}


def quantized_by(kind: str, case: Case) -> Pruned:
    anatomy, results = swept(kind)
    if case not in results:  # only asked for with -m full
        own = job(recipe_of(anatomy, *case))
        results[case] = sweep(anatomy, [own], text(), batch_tokens=32)(own)
    return results[case]


def rows_of(inputs: Inputs, key: tuple[int, str]) -> torch.Tensor:
    return torch.cat(list(inputs[key].values()))


def naive_weights(anatomy: Anatomy, inputs: Inputs, case: Case) -> dict[tuple[int, str], torch.Tensor]:
    method, bits, group, symmetric = case
    made, layer = {}, len(anatomy.blocks) - 1
    for of_input in anatomy.groups(layer):
        x = rows_of(inputs, (layer, of_input.leader))
        weights = {role: anatomy.weight(layer, role) for role in of_input.roles}
        if method == "rtn" or not len(x):  # an expert that no token was sent to
            own = {role: naive.rtn(weight, bits, group, bool(symmetric)) for role, weight in weights.items()}
        elif method == "awq":
            own = naive.awq(weights, x, bits, group, bool(symmetric))
        else:
            switch = {name: True for name in ("order", "static") if method == f"gptq-{name}"}
            own = {
                role: naive.gptq(weight, x, bits, group, bool(symmetric), **switch) for role, weight in weights.items()
            }
        made |= {(layer, role): weight for role, weight in own.items()}
    return made


@pairwise(AXES)
def test_weights_are_those_of_a_naive_float64_version(kind, method, bits, group, symmetric):
    anatomy, _ = swept(kind)
    reference, inputs = double(kind)
    case = (method, bits, group, symmetric)
    codes = quantized_by(kind, case).codes
    expected = naive_weights(reference, inputs, case)
    assert set(codes) == set(expected)
    errors = {"ours": 0.0, "naive": 0.0, "rounded": 0.0}
    different = 0
    for key in expected:
        dense, weight = anatomy.weight(*key), codes[key].unpacked().weight()
        # a weight halfway between two values may go either way in float32
        different += int((~torch.isclose(weight.double(), expected[key], rtol=1e-4, atol=1e-6)).sum())
        if len(x := rows_of(inputs, key)):
            errors["ours"] += naive.reconstruction_error(dense, weight, x)
            errors["naive"] += naive.reconstruction_error(dense, expected[key], x)
            errors["rounded"] += naive.reconstruction_error(dense, naive.rtn(dense, bits, group, symmetric), x)
    total = sum(dense.numel() for dense in expected.values())
    assert errors["ours"] == pytest.approx(errors["naive"], rel=0.02 if method.startswith("gptq") else 2e-3)
    if method == "rtn":
        assert different <= 1e-3 * total
    else:
        assert different <= 0.05 * total
        assert errors["ours"] < errors["rounded"]


@pairwise(AXES)
def test_sizes_are_exact(kind, method, bits, group, symmetric):
    anatomy, _ = swept(kind)
    codes = quantized_by(kind, (method, bits, group, symmetric)).codes
    for key in codes:
        outputs, inputs = anatomy.shape(*key)
        groups = outputs * (inputs // group if group else 1)
        size = outputs * inputs * bits + groups * (16 if symmetric else 16 + bits)
        scaled = method == "awq" and codes[key].divisors is not None
        assert codes.size(key) == size + (16 * inputs if scaled else 0)
        assert scaled == (method == "awq" and len(rows_of(double(kind)[1], key)) > 0)
        assert len(torch.unique(codes[key].unpacked().codes)) <= 2**bits


@pytest.mark.parametrize("kind", ["llama", "bloom", "mixtral"])
def test_quantized_weights_are_passed_on_to_the_next_block(kind):
    recipe = Recipe(method="gptq", bits=2, group=8)
    codes = sweep(Anatomy(tiny_model(kind)), [job(recipe)], text(), batch_tokens=32)(job(recipe)).codes
    reference = Anatomy(double_model(kind))
    for layer in range(len(reference.blocks)):
        inputs = catch_inputs(reference)
        for role in reference.roles(layer):
            x, dense = rows_of(inputs, (layer, role)), reference.weight(layer, role)
            if len(x):
                expected = naive.gptq(dense, x, 2, 8)
                ours = naive.reconstruction_error(dense, codes[layer, role].unpacked().weight(), x)
                assert ours == pytest.approx(naive.reconstruction_error(dense, expected, x), rel=0.1), (layer, role)
        for role in reference.roles(layer):
            reference.set_weight(layer, role, codes[layer, role].unpacked().weight().double())


def wide_inputs(inputs: int, tokens: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    scales = torch.randn(inputs, generator=random).exp()
    causes = torch.randn(tokens, 8, generator=random) @ torch.randn(8, inputs, generator=random) / 3
    x = (torch.randn(tokens, inputs, generator=random) + causes) * scales
    x[:, [0, 5, inputs // 2, inputs - 1]] = 0  # dead
    return x


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], frozenset({GRAM, ABSOLUTE}))
    for rows in x.split(100):
        statistics.add(rows)
    return statistics


@pytest.mark.parametrize(
    ("inputs", "group", "switch"),
    [
        *((640, 128, {}), (640, 64, {"order": 1.0}), (640, 32, {}), (640, 320, {}), (640, 40, {}), (300, 0, {})),
        *((640, 0, {"order": 1.0}), (20, 0, {}), (640, 128, {"static": 1.0}), (640, 320, {"static": 1.0})),
    ],
)
def test_wide_matrices_are_quantized_as_published(inputs, group, switch):
    x = wide_inputs(inputs, 900)
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, inputs, generator=random) * 0.02 for outputs in (5, 7)]
    copies = [weight.clone() for weight in weights]
    coded = gptq.quantize(weights, Statistics(statistics_of(x)), Grid(3, group), ["q", "k"], **switch)
    rounded = rtn.quantize(weights, Statistics(), Grid(3, group), ["q", "k"])
    for weight, copy, own, plain in zip(weights, copies, coded.weights, rounded.weights, strict=True):
        assert torch.equal(weight, copy)
        published = naive.gptq(weight, x, 3, group, **{name: bool(value) for name, value in switch.items()})
        ours = naive.reconstruction_error(weight, own.weight(), x)
        assert ours == pytest.approx(naive.reconstruction_error(weight, published, x), rel=0.03)
        assert ours < 0.95 * naive.reconstruction_error(weight, plain.weight(), x)


def test_gptq_and_sparsegpt_share_one_factorization_for_each_order_of_the_inputs(monkeypatch):
    inputs = statistics_of(wide_inputs(64, 200))
    factorized = []
    monkeypatch.setattr(
        columns, "factorize", lambda matrix, before=columns.factorize: factorized.append(1) or before(matrix)
    )
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    sparsegpt.solve([weight], Statistics(inputs), pattern_named("row"), [256])
    for bits in (2, 4):
        gptq.quantize([weight], Statistics(inputs), Grid(bits, 32), ["q"])
    assert len(factorized) == 1
    for bits in (2, 4):
        gptq.quantize([weight], Statistics(inputs), Grid(bits, 32), ["q"], order=1.0)
    assert len(factorized) == 2


@pytest.mark.parametrize("method", [gptq, awq])
def test_inputs_that_are_not_finite_are_noticed(method):
    x = torch.ones(20, 16)
    x[3, 4] = torch.inf
    with pytest.raises(ArithmeticError):
        method.quantize([torch.ones(4, 16)], Statistics(statistics_of(x)), Grid(4, 8), ["q"])


@pytest.mark.parametrize("symmetric", [False, True])
def test_grids_hold_zero_and_what_they_span(symmetric):
    weights = torch.stack(
        [torch.linspace(1, 2, 8), torch.linspace(-2, -1, 8), torch.linspace(-1, 3, 8), torch.zeros(8)]
    )
    quantized = Grid(4, 8, symmetric).quantized(weights)
    step = quantized.scales.float()
    error = (quantized.weight() - weights).abs()
    inside = (
        weights < weights.abs().amax(dim=1, keepdim=True) - step / 2
    )  # the largest is cut where codes are symmetric
    assert bool((error <= step * (0.501 if not symmetric else torch.where(inside, 0.501, 1.01))).all())
    assert torch.equal(quantized.weight()[3], torch.zeros(8))
    if not symmetric:
        assert isclose(float(step[0, 0]), 2 / 15, rel_tol=1e-3)  # from 0, not from 1


def test_weights_too_small_or_too_large_for_16_bit_scales_stay_finite_or_are_refused():
    tiny = torch.full((1, 8), 1e-12)
    assert bool((Grid(4, 8).quantized(tiny).weight().abs() < 1e-6).all())
    huge = torch.tensor([[1e9] + [0.0] * 7])
    assert bool(Grid(4, 8).quantized(huge).scales.isinf().any())


def test_experts_that_see_nothing_are_rounded_and_reported():
    anatomy = Anatomy(tiny_model("mixtral"))
    router = anatomy.module(0, "mlp.gate")
    with torch.no_grad():
        router.weight[3] = -100 * router.weight[:3].abs().sum(dim=0)  # the last choice of any token ...
        router.weight[:3].abs_()
        anatomy.model.model.embed_tokens.weight.abs_()  # ... whose states are positive
        anatomy.model.model.layers[0].post_attention_layernorm.weight.abs_()
        anatomy.weight(0, "o").zero_()
    recipes = [Recipe(method=method, bits=3, group=8) for method in ("gptq", "awq")]
    done = sweep(anatomy, [job(recipe) for recipe in recipes], text())
    for recipe in recipes:
        result = done(job(recipe))
        said = "block 0, gate.3 and up.3: no calibration token reached them; rounded to the nearest"
        assert said in result.remarks
        expected = Grid(3, 8).quantized(anatomy.weight(0, "up.3"))
        assert torch.equal(result.codes[0, "up.3"].unpacked().weight(), expected.weight())


def test_a_weight_that_is_not_finite_sets_the_variant_aside():
    anatomy = Anatomy(tiny_model("llama"))
    anatomy.weight(1, "up")[0, 0] = torch.nan
    recipes = [Recipe(method="rtn", bits=4, group=8), Recipe(method="rtn", bits=4, group=8, blocks="0")]
    done = sweep(anatomy, [job(recipe) for recipe in recipes])
    assert [done.set_aside.get(job(recipe), "made")[:30] for recipe in recipes] == [
        "block 1, role gate: a weight o",
        "made",
    ]
