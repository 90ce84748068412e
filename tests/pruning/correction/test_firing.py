"""Biases that keep neurons firing as often as before: formula, effect on planted neurons, and all architectures."""

from __future__ import annotations

import naive
import pytest
import torch
from activations import inputs_like_a_models, statistics_of
from checkpoints import CORPUS, SHORT
from conftest import ARCHITECTURES, tiny_model, tiny_tokenizer
from pairwise import pairwise
from reference import double, job, text

from pruning import Anatomy, Recipe, prune
from pruning.correction import firing
from pruning.engine import flow, sweep
from pruning.errors import RecipeError, VariantError
from pruning.patterns import pattern_named
from pruning.statistics import GRAM, MOMENTS

FIRE = {"llama": ["gate"], "gpt2": ["up"], "qwen2_moe": ["gate", "shared_gate"]}


def halved(weight: torch.Tensor) -> torch.Tensor:
    pattern = pattern_named("row")
    return weight * pattern.keep(weight.float().abs(), pattern.uniform(tuple(weight.shape), 0.5))


@pairwise(
    {
        "tokens": [30, 900],
        "offset": [0.0, 3.0],
        "biased": [False, True],
        "scale": [0, 1],
        "dtype": [torch.float32, torch.bfloat16],
    }
)
def test_biases_equal_a_naive_float64_version(tokens, offset, biased, scale, dtype):
    x = inputs_like_a_models(40, tokens) + offset
    random = torch.Generator().manual_seed(3)
    weight = (torch.randn(25, 40, generator=random) / 20).to(dtype)
    bias = torch.randn(25, generator=random).to(dtype) if biased else None
    pruned = halved(weight)
    found, added = firing.settle(weight, pruned, statistics_of(x, GRAM, MOMENTS), bias, scale=scale)
    expected, wanted = naive.firing(weight, pruned, x, bias, scale)
    assert (found is pruned) == (not scale)
    size = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found.double(), expected, **size)
    torch.testing.assert_close(added.double(), wanted, **size)


def test_rescaled_rows_keep_mean_and_deviation():
    x = inputs_like_a_models(40, 500) + 1
    weight = torch.randn(25, 40, generator=torch.Generator().manual_seed(3)) / 20
    pruned = halved(weight)
    found, bias = firing.settle(weight, pruned, statistics_of(x, GRAM, MOMENTS), None, scale=1)
    before, after = x @ weight.T, x @ found.T + bias
    torch.testing.assert_close(after.mean(dim=0), before.mean(dim=0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.std(dim=0), before.std(dim=0), rtol=1e-3, atol=1e-3)
    assert torch.equal(found != 0, pruned != 0)


def test_rare_neurons_fire_as_often_as_before_on_text_that_was_not_seen():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 64, generator=random) + torch.randn(64, generator=random)
    weight = torch.randn(200, 64, generator=random)
    weight -= (weight @ x.mean(dim=0))[:, None] * x.mean(dim=0) / x.mean(dim=0).square().sum()
    weight -= 0.9 * weight.norm(dim=1, keepdim=True) * x.mean(dim=0) / x.mean(dim=0).square().sum()  # a fifth fire
    seen, fresh = x[:10_000], x[10_000:]
    pruned = halved(weight)
    rate = (fresh @ weight.T > 0).double().mean(dim=0)
    assert 0.05 < rate.median() < 0.3
    apart = {}
    for name, permute in (("corrected", 0), ("dealt out", 1)):
        _, bias = firing.settle(weight, pruned, statistics_of(seen, GRAM, MOMENTS), None, permute=permute)
        apart[name] = ((fresh @ pruned.T + bias > 0).double().mean(dim=0) - rate).abs().mean()
    without = ((fresh @ pruned.T > 0).double().mean(dim=0) - rate).abs().mean()
    assert apart["corrected"] < 0.1 * without
    assert apart["dealt out"] > 0.5 * without


@pytest.mark.parametrize("scale", [0, 1])
def test_the_control_deals_out_the_same_changes_in_another_order(scale):
    x = inputs_like_a_models(40, 500) + 1
    weight = torch.randn(25, 40, generator=torch.Generator().manual_seed(3)) / 20
    pruned, own = halved(weight), torch.linspace(-1, 1, 25)
    statistics = statistics_of(x, GRAM, MOMENTS)
    rows, one = firing.settle(weight, pruned, statistics, own, scale=scale)
    others, other = firing.settle(weight, pruned, statistics, own, scale=scale, permute=2)
    again, same = firing.settle(weight, pruned, statistics, own, scale=scale, permute=2)
    assert torch.equal(other, same)
    assert torch.equal(others, again)
    assert not torch.equal(one, other)
    torch.testing.assert_close((one - own).sort().values, (other - own).sort().values)
    if scale:
        factors = [(found.abs().sum(dim=1) / pruned.abs().sum(dim=1)).sort().values for found in (rows, others)]
        torch.testing.assert_close(*factors)


def test_rows_whose_input_does_not_vary_get_their_mean():
    x = inputs_like_a_models(10, 50)
    x[:, 0] = 2.0
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(3))
    pruned = weight.clone()
    pruned[0] = 0  # nothing left
    pruned[1, 1:] = 0  # a constant left
    _, bias = firing.settle(weight, pruned, statistics_of(x, GRAM, MOMENTS), None)
    mean = (x @ weight.T).mean(dim=0)
    torch.testing.assert_close(bias[0], mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias[1], mean[1] - 2 * weight[1, 0], rtol=1e-3, atol=1e-3)
    assert abs(bias[2]) < 1e-3 * mean.abs().max()
    x[:, 1:] *= float("inf")
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        firing.settle(weight, pruned, statistics_of(x, GRAM, MOMENTS), None)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in ("mixtral", "qwen3_moe", "phi3")])
def test_every_architecture_gets_the_biases_of_what_its_neurons_fire_on(kind, method):
    plain, corrected = (
        job(Recipe(method=method, sparsity=0.5, propagation="dense", correction=correction))
        for correction in ("none", "firing")
    )
    take = sweep(Anatomy(tiny_model(kind)), [plain, corrected], text(), batch_tokens=32)
    mine, other = take(corrected), take(plain)
    assert not other.biases
    anatomy, inputs = double(kind)
    assert set(mine.biases) == {(n, role) for n in range(len(anatomy.blocks)) for role in anatomy.firing_roles(n)}
    assert {role for _, role in mine.biases} <= {"gate", "up", "shared_gate"}
    if kind in FIRE:
        assert sorted({role for _, role in mine.biases}) == FIRE[kind]
    for key in anatomy:
        assert torch.equal(mine.masks[key], other.masks[key])
        if key in mine.biases:
            rows = torch.cat(list(inputs[key].values()))
            weight = anatomy.weight(*key)
            pruned = weight * other.masks[key]
            if key in other.values:  # those of kept weights, one after the other
                pruned[other.masks[key]] = other.values[key].double()
            _, bias = naive.firing(weight, pruned, rows, anatomy.bias(*key), 0)
            assert torch.allclose(mine.biases[key].double(), bias, atol=2e-5, rtol=1e-3), key
    assert set(mine.values) == set(other.values)  # nothing but biases is stored


def test_statistics_are_gathered_only_where_neurons_read(monkeypatch):
    asked = {}
    gather = flow.gather

    def watched(anatomy, layer, stream, wanted, *rest, **more):
        asked.update(wanted)
        return gather(anatomy, layer, stream, wanted, *rest, **more)

    monkeypatch.setattr(flow, "gather", watched)
    wanted = job(Recipe(method="wanda", sparsity=0.5, correction="firing"))
    sweep(Anatomy(tiny_model("llama")), [wanted], text())
    assert {group.roles: GRAM in needs for group, needs in asked.items()} == {
        ("q", "k", "v"): False,
        ("o",): False,
        ("gate", "up"): True,
        ("down",): False,
    }


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("phi3", {}, "needs a bias of gate, which shares its module .* phi3 model .* leave it out"),
        ("mixtral", {}, "experts have no biases, or leave it out"),
        ("llama", {"roles": ("up", "down")}, "include gate, whose outputs decide it"),
    ],
)
def test_models_that_cannot_have_such_biases_are_refused(kind, given, message):
    wanted = job(Recipe(method="wanda", sparsity=0.5, correction="firing", **given))
    with pytest.raises(RecipeError, match=message):
        sweep(Anatomy(tiny_model(kind)), [wanted], text())


def test_checkpoints_hold_them_or_the_export_is_refused(tmp_path):
    recipe = Recipe(method="wanda", sparsity=0.5, correction="firing")
    tokenizer = tiny_tokenizer()
    ids = torch.arange(3, 40)[None]
    for kind, kept in (("llama", True), ("gemma3_text", False)):
        model = tiny_model(kind)
        (variant,) = prune(model, tokenizer, recipe, CORPUS, SHORT)
        assert variant.biases
        assert not variant.values
        if not kept:
            with pytest.raises(VariantError, match='no bias of gate; prune without correction = "firing"'):
                variant.export(model, tokenizer, tmp_path / kind)
            continue
        variant.export(model, tokenizer, tmp_path / kind)
        again = type(model).from_pretrained(tmp_path / kind).eval()
        with variant.applied(model), torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits)
