"""The language-specific part of what projections read, at less weight: against plain float64 with hooks on norms."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import naive
import pytest
import torch
from checkpoints import CORPUS, SHORT, saved
from conftest import DECODERS, tiny_model
from reference import CALIBRATION, catch_inputs, double_model, job, run_model, text, tokens

from pruning import Anatomy, Recipe, Subspaces, load_model, prune
from pruning.engine import sweep
from pruning.engine.jobs import check_fits
from pruning.engine.plan import make_plan
from pruning.errors import ModelError, RecipeError
from pruning.methods import sparsegpt
from pruning.models.norms import norm_of
from pruning.patterns import pattern_named
from pruning.statistics import GRAM, InputStatistics, Statistics

#: Norms before attention and MLP, as one reads them in each architecture's own code; whether gains are 1 + weight.
NORMS = {
    "llama": ("input_layernorm", "post_attention_layernorm", 0),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm", 1),
    "cohere": ("input_layernorm", "input_layernorm", 0),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm", 0),
    "gpt2": ("ln_1", "ln_2", 0),
    "opt": ("self_attn_layer_norm", "final_layer_norm", 0),
    "mixtral": ("input_layernorm", "post_attention_layernorm", 0),
}
CENTRED = ("cohere", "gpt_neox", "gpt2", "opt")
RANK = 2


def with_gains(model, kind):
    """Give every norm of a block gains of its own, one of them 0, and biases where it has any."""
    draws = torch.Generator().manual_seed(3)
    anatomy = Anatomy(model)
    for block in anatomy.blocks:
        for path in dict.fromkeys(NORMS[kind][:2]):
            norm = block.get_submodule(path)
            size = norm.weight.shape[0]
            gain = 0.3 + torch.rand(size, generator=draws, dtype=torch.float64)
            gain[5] = 0
            norm.weight.data = (gain - NORMS[kind][2]).to(norm.weight)
            if getattr(norm, "bias", None) is not None:
                norm.bias.data = torch.randn(size, generator=draws, dtype=torch.float64).to(norm.weight) / 3
    return model


def norm_inputs(anatomy, kind):
    """Return the stream before the norms of each block, by block and path, caught by plain hooks."""
    caught = {}

    def keep(module, args, place):
        caught.setdefault(place, []).append(args[0].reshape(-1, args[0].shape[-1]))

    handles = [
        block.get_submodule(path).register_forward_pre_hook(partial(keep, place=(layer, path)))
        for layer, block in enumerate(anatomy.blocks)
        for path in dict.fromkeys(NORMS[kind][:2])
    ]
    with torch.no_grad():
        for ids in tokens().values():
            for row in ids:
                run_model(anatomy, row[None])
    for handle in handles:
        handle.remove()
    return {place: torch.cat(rows) for place, rows in caught.items()}


def planted(streams, kind):
    """Return a basis after each block: the directions in which the stream before the next one is largest."""
    attention = NORMS[kind][0]
    layers = max(layer for layer, _ in streams)
    bases = [torch.linalg.svd(streams[layer, attention])[2][:RANK].T for layer in range(1, layers + 1)]
    return [*bases, bases[-1]]  # nothing reads what is behind the last block


def without(h, basis, norm, kind, weight):
    """Return what a projection reads if the stream's part in a subspace is weighted before the norm's gains."""
    gain = norm.weight.data.double() + NORMS[kind][2]
    bias = getattr(norm, "bias", None)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    if kind in CENTRED:
        scaled = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + eps).sqrt()
        basis = torch.linalg.qr(basis - basis.mean(0))[0]
    else:
        scaled = h / (h.square().mean(1, keepdim=True) + eps).sqrt()
    read = torch.where(gain == 0, 0.0, scaled)  # what a gain of 0 hides is not to be had from the inputs
    scaled = scaled - (1 - weight) * read @ basis @ basis.T
    return gain * scaled + (0 if bias is None else bias.data.double())


def expected_inputs(kind, weight, tmp_path):
    """Return the inputs of every projection with the part at a weight, in float64, and the file of its subspaces."""
    anatomy = Anatomy(with_gains(double_model(kind), kind))
    plain, streams = catch_inputs(anatomy), norm_inputs(anatomy, kind)
    bases = planted(streams, kind)
    found = {}
    for layer, role in anatomy:
        name = role.partition(".")[0]
        path = NORMS[kind][0] if name in ("q", "k", "v") else NORMS[kind][1]
        rows = torch.cat(list(plain[layer, role].values()))
        if layer and name in ("q", "k", "v", "gate", "up"):
            norm = anatomy.module(layer, path)
            whole = without(streams[layer, path], bases[layer - 1], norm, kind, 1.0)
            changed = without(streams[layer, path], bases[layer - 1], norm, kind, weight)
            if len(rows) < len(whole):  # an expert reads the tokens that are sent to it
                places = [int((whole - row).norm(dim=1).argmin()) for row in rows]
                whole, changed = whole[places], changed[places]
            torch.testing.assert_close(
                whole, rows, rtol=1e-5, atol=1e-5
            )  # so that this is the norm, and its mathematics
            rows = changed
        found[layer, role] = rows
    subspaces = Subspaces.save(
        tmp_path / f"{kind}.safetensors",
        bases,
        model_fingerprint=Anatomy(tiny_model(kind)).fingerprint(),
        languages=("en", "sw"),
    )
    return anatomy, found, subspaces


def swept(kind, recipes):
    made = sweep(Anatomy(with_gains(tiny_model(kind), kind)), [job(r) for r in recipes], text(), batch_tokens=32)
    return [made(job(recipe)).masks for recipe in recipes]


@pytest.mark.parametrize(
    ("kind", "method", "pattern", "weight"),
    [
        *((kind, "wanda", "row", 0.0) for kind in NORMS),
        ("llama", "wanda", "2:4", 0.0),
        ("gpt2", "ria", "matrix", 0.0),
        ("gemma3_text", "wanda", "row", 0.4),
        ("gpt2", "wanda", "row", 0.4),
    ],
)
def test_masks_are_those_of_inputs_whose_part_in_the_subspace_is_taken_out(kind, method, pattern, weight, tmp_path):
    anatomy, inputs, subspaces = expected_inputs(kind, weight, tmp_path)
    settings = {"method": method, "pattern": pattern, "sparsity": 0.5, "propagation": "dense"}
    recipe = Recipe(**settings, parameters={"specific": weight}, subspaces=subspaces)
    masks, plain = swept(kind, [recipe, Recipe(**settings)])
    score = {"wanda": naive.wanda, "ria": naive.ria}[method]
    keep = {
        "row": lambda scores: naive.keep_row(scores, 0.5),
        "matrix": lambda scores: naive.keep_matrix(scores, 0.5),
        "2:4": lambda scores: naive.keep_n_m(scores, 2, 4),
    }[pattern]
    differing = total = changed = reading = 0
    for layer, role in anatomy:
        weights, rows = anatomy.weight(layer, role), inputs[layer, role]
        mask = keep(score(weights, rows) if len(rows) else naive.magnitude(weights))
        differing += int((masks[layer, role] != mask).sum())
        total += mask.numel()
        if layer and role.partition(".")[0] in ("q", "k", "v", "gate", "up"):
            changed += int((masks[layer, role] != plain[layer, role]).sum())
            reading += mask.numel()
        else:  # o, down and the first block are left alone, to the bit
            assert torch.equal(masks[layer, role], plain[layer, role]), (layer, role)
    assert differing <= 1e-3 * total  # scores that float32 cannot tell apart may change places
    assert changed > (0.02 if weight == 0 else 0.01) * reading


def test_pruned_propagation_weights_the_stream_of_the_pruned_model(tmp_path):
    kind = "llama"
    _, _, subspaces = expected_inputs(kind, 0.0, tmp_path)
    recipe = Recipe(method="wanda", sparsity=0.5, parameters={"specific": 0}, subspaces=subspaces)
    (masks,) = swept(kind, [recipe])
    anatomy = Anatomy(with_gains(double_model(kind), kind))
    for layer in range(len(anatomy.blocks)):
        inputs, streams = catch_inputs(anatomy), norm_inputs(anatomy, kind)
        for role in anatomy.roles(layer):
            rows = torch.cat(list(inputs[layer, role].values()))
            if layer and role in ("q", "k", "v", "gate", "up"):
                path = NORMS[kind][role in ("gate", "up")]
                basis = subspaces.before(layer).double()
                rows = without(streams[layer, path], basis, anatomy.module(layer, path), kind, 0.0)
            expected = naive.keep_row(naive.wanda(anatomy.weight(layer, role), rows), 0.5)
            assert int((masks[layer, role] != expected).sum()) <= 2e-3 * expected.numel(), (layer, role)
        for role in anatomy.roles(layer):
            anatomy.set_weight(layer, role, anatomy.weight(layer, role) * masks[layer, role])


def test_sparsegpt_solves_with_the_gram_matrix_of_such_inputs(tmp_path):
    anatomy, inputs, subspaces = expected_inputs("llama", 0.0, tmp_path)
    settings = {"method": "sparsegpt", "sparsity": 0.5, "propagation": "dense"}
    recipes = [Recipe(**settings, parameters={"specific": 0}, subspaces=subspaces), Recipe(**settings)]
    masks, plain = swept("llama", recipes)
    agree = alike = 0
    for layer in (1, 2):
        statistics = InputStatistics(32, frozenset({GRAM}))
        statistics.add(inputs[layer, "q"])
        weight = anatomy.weight(layer, "q").float()
        pattern = pattern_named("matrix")
        (mask,) = sparsegpt.solve([weight], Statistics(statistics), pattern, [weight.numel() // 2]).masks
        agree += int((mask == masks[layer, "q"]).sum())
        alike += int((plain[layer, "q"] == masks[layer, "q"]).sum())
    assert agree >= 0.995 * 2 * 32 * 32
    assert alike < 0.99 * 2 * 32 * 32


def test_all_of_the_weight_is_the_plain_recipe_and_others_beside_it_change_nothing(tmp_path):
    _, _, subspaces = expected_inputs("llama", 0.0, tmp_path)
    plain = Recipe(method="wanda", sparsity=0.5)
    assert Recipe(method="wanda", sparsity=0.5, parameters={"specific": 1}, subspaces=subspaces) == plain
    others = [
        Recipe(method=method, sparsity=0.5, parameters={"specific": weight}, subspaces=subspaces)
        for method in ("wanda", "sparsegpt")
        for weight in (0, 0.5)
    ]
    (alone,) = swept("llama", [plain])
    beside, *changed = swept("llama", [plain, *others])
    assert beside == alone
    assert all(masks != alone for masks in changed)


def test_a_model_that_is_read_from_its_shards_gives_the_same_masks(tmp_path):
    folder = saved(with_gains(tiny_model("llama"), "llama"), tmp_path / "model")
    masks = []
    for stream in (False, True):
        model, tokenizer = load_model(str(folder), dtype="float32", stream=stream)
        draws = torch.Generator().manual_seed(5)
        bases = [torch.linalg.qr(torch.randn(32, RANK, generator=draws))[0] for _ in range(3)]
        fingerprint = Anatomy(model).fingerprint()
        subspaces = Subspaces.save(tmp_path / "s", bases, model_fingerprint=fingerprint, languages=("en", "sw"))
        recipe = Recipe(method="wanda", sparsity=0.5, parameters={"specific": 0}, subspaces=subspaces)
        (variant,) = prune(model, tokenizer, recipe, CORPUS, SHORT)
        masks.append(variant.masks)
    assert masks[0] == masks[1]


def test_the_plan_counts_a_gram_matrix_and_its_factor_for_every_weight(tmp_path):
    model = tiny_model("llama", hidden_size=512, num_attention_heads=8)
    bases = [torch.eye(512, RANK)] * 3
    subspaces = Subspaces.save(tmp_path / "s", bases, model_fingerprint="4f", languages=("en", "sw"))
    peaks = []
    for weights in ((1,), (1, 0.5), (1, 0.5, 0)):
        recipes = [
            Recipe(
                method="sparsegpt",
                sparsity=0.5,
                propagation="dense",
                parameters={"specific": weight},
                subspaces=subspaces,
            )
            for weight in weights
        ]
        peaks.append(make_plan(Anatomy(model), [job(recipe) for recipe in recipes], text(), in_folder=False).memory)
    masks = 7 * 3 * 512 * 512  # the variants themselves are far smaller than this
    for fewer, more in pairwise(peaks):
        assert more - fewer >= 2 * 3 * 512**2 * 4  # of q, o and gate
        assert more - fewer <= 10 * (2 * 3 * 512**2 * 4) + masks


def test_owl_and_a_threshold_over_the_model_compare_such_scores(tmp_path):
    _, _, subspaces = expected_inputs("llama", 0.0, tmp_path)
    recipes = [
        Recipe(method="wanda", sparsity=0.5, **settings, **weighting)
        for settings in ({"allocation": "owl"}, {"pattern": "model"}, {"pattern": "neurons"})
        for weighting in ({}, {"parameters": {"specific": 0}, "subspaces": subspaces})
    ]
    masks = swept("llama", recipes)
    for plain, weighted in zip(masks[::2], masks[1::2], strict=True):
        assert plain != weighted
        assert plain.kept() == weighted.kept()


@pytest.mark.parametrize("kind", DECODERS)
def test_the_norm_before_each_reader_is_known_and_what_it_does_is_found(kind):
    anatomy = Anatomy(tiny_model(kind))
    draws = torch.Generator().manual_seed(1)
    for name, parameter in anatomy.model.named_parameters():
        if parameter.ndim == 1 and ("norm" in name or "ln_" in name):
            parameter.data += torch.rand(parameter.shape, generator=draws) / 2
    seen = {}

    def before(module, args, place):
        seen[place, "before"] = args[0].detach().reshape(-1, args[0].shape[-1])

    def reads(module, args, place):
        seen[place, "read"] = args[0].detach().reshape(-1, args[0].shape[-1])

    known, handles = [], []
    for layer in range(len(anatomy.blocks)):
        for group in anatomy.groups(layer):
            path = anatomy.norm_before(layer, group.leader)
            assert bool(path) == (group.leader.partition(".")[0] in ("q", "gate", "up", "shared_gate"))
            if path and not group.inner:
                place = (layer, group.leader)
                known.append((place, path))
                handles.append(anatomy.module(layer, path).register_forward_pre_hook(partial(before, place=place)))
                module = anatomy.module(layer, group.module)
                handles.append(module.register_forward_pre_hook(partial(reads, place=place)))
    with torch.no_grad():
        run_model(anatomy, tokens()["en"])
    for handle in handles:
        handle.remove()
    assert known
    for place, path in known:
        norm = norm_of(anatomy.module(place[0], path), anatomy.hidden_size, torch.device("cpu"))
        found, read = (rows - norm.shift for rows in (norm(seen[place, "before"]), seen[place, "read"]))
        sizes = [rows.norm(dim=1, keepdim=True) for rows in (found, read)]  # which the norm's epsilon changes a little
        torch.testing.assert_close(sizes[0], sizes[1], rtol=0.05, atol=0)
        torch.testing.assert_close(found / sizes[0], read / sizes[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [3, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_norm_does_is_found_whatever_its_size_and_dtype(size, dtype):
    weight, bias = torch.linspace(-1, 2, size).to(dtype), torch.linspace(0, 1, size).to(dtype)
    rms = torch.nn.RMSNorm(size, eps=1e-6, dtype=dtype)
    rms.weight.data = weight
    layer = torch.nn.LayerNorm(size, dtype=dtype)
    layer.weight.data, layer.bias.data = weight, bias
    found = [norm_of(module, size, torch.device("cpu")) for module in (rms, layer)]
    assert [norm.centred for norm in found] == [False, True]
    for norm in found:
        torch.testing.assert_close(norm.gain, weight.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].shift, bias.float())
    with pytest.raises(ModelError, match=r'"Tanh" is no norm with one scale per token'):
        norm_of(torch.nn.Tanh(), size, torch.device("cpu"))


def test_subspaces_that_do_not_fit_are_refused_in_one_line(tmp_path, tokenizer):
    anatomy, _, subspaces = expected_inputs("llama", 0.0, tmp_path)
    recipe = Recipe(method="wanda", sparsity=0.5, parameters={"specific": 0}, subspaces=subspaces)
    other = tiny_model("llama", seed=1)
    with pytest.raises(RecipeError, match="has the subspaces of a model other than "):
        prune(other, tokenizer, recipe, None, CALIBRATION)
    for kind, settings, message in (
        ("llama", {"num_hidden_layers": 2}, "are of 3 blocks of width 32, and this model has 2 of width 32"),
        ("llama", {"hidden_size": 64}, "are of 3 blocks of width 32, and this model has 3 of width 64"),
        ("mt5", {}, "this mt5 model has an encoder and a decoder"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_fits(Anatomy(tiny_model(kind, **settings)), recipe)
    for scope in ({"roles": ("o", "down")}, {"blocks": "0"}):
        settings = {"parameters": {"specific": 0}, "subspaces": subspaces}
        with pytest.raises(RecipeError, match="specific = 0 changes nothing: no projection in scope reads the stream"):
            check_fits(anatomy, Recipe(method="wanda", sparsity=0.5, **scope, **settings))
    anatomy._blocks[1].norms["q"] = ""
    with pytest.raises(RecipeError, match='the norm through which q reads the stream, which is not known of "llama"'):
        check_fits(anatomy, recipe)
