from __future__ import annotations

from contextlib import ExitStack, contextmanager
from itertools import combinations, groupby

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning import ROLES, Anatomy, Experts, Fused, Layout, register_architecture, supported_architectures
from pruning.errors import ModelError
from pruning.models import layouts as architectures
from pruning.models.anatomy import InputGroup, role_kind

SEVEN = ("q", "k", "v", "o", "gate", "up", "down")
UNGATED = ("q", "k", "v", "o", "up", "down")
#: In the table, but of the same code as others.
COUSINS = ("t5", "umt5")
#: Not in the table, and made out from their structure.
DISCOVERED = ("olmo2", "granite", "starcoder2", "phi", "stablelm", "xglm", "biogpt", "nemotron")


def run(model, ids=None):
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0)) if ids is None else ids
    more = {"decoder_input_ids": ids.flip(1)[:, :-2]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more)


@contextmanager
def watched(modules):
    """Note, in the order in which they run, the first argument and the output of modules given by name."""
    seen = {}

    def note(name):
        def hook(module, arguments, keywords, output):
            first = arguments[0] if arguments else next(iter(keywords.values()))
            output = output[0] if isinstance(output, tuple) else output
            assert name not in seen, f"{name} ran twice"
            seen[name] = (first.detach().clone(), output.detach().clone())

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(note(name), with_kwargs=True).remove)
        yield seen


def watch_sites(model, anatomy):
    """Run a model and return the input and output of the module of every site."""
    modules = {}
    for layer in range(len(anatomy.blocks)):
        for site in anatomy.sites(layer):
            modules.setdefault(anatomy.path(layer, site), model.get_submodule(anatomy.path(layer, site)))
    with watched(modules) as seen:
        run(model)
    return seen


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def roles_of(kind, layer):
    experts = tuple(f"{role}.{e}" for e in range(4) for role in ("gate", "up", "down"))
    if kind == "mt5" and layer >= 2:
        return ("q", "k", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o", "gate", "up", "down")
    if kind == "mixtral" or (kind == "qwen3_moe" and layer != 1):
        return ("q", "k", "v", "o", *experts)
    if kind == "qwen2_moe" and layer != 0:
        return ("q", "k", "v", "o", "shared_gate", "shared_up", "shared_down", *experts)
    return UNGATED if kind in ("gpt_neox", "bloom", "opt", "gpt2") else SEVEN


def test_every_block_has_its_roles_in_running_order(make_model, architecture):
    anatomy = Anatomy(make_model(architecture))
    blocks = range(len(anatomy.blocks))
    assert list(anatomy) == [(layer, role) for layer in blocks for role in roles_of(architecture, layer)]
    assert [anatomy.roles(layer) for layer in blocks] == [roles_of(architecture, layer) for layer in blocks]
    assert [anatomy.has_gate(layer) for layer in blocks] == [
        "gate" in map(role_kind, anatomy.roles(layer)) for layer in blocks
    ]
    assert set(anatomy.role_kinds()) == {role_kind(role) for _, role in anatomy} <= set(ROLES)


def test_shapes_are_those_of_the_projections(make_model, architecture):
    anatomy = Anatomy(make_model(architecture))
    neurons = 128 if architecture == "bloom" else 48
    dense = 1 if architecture == "qwen3_moe" else 0
    suffix = ".3" if architecture == "mixtral" else ""
    assert anatomy.shape(dense, f"up{suffix}") == (neurons, 32)
    assert anatomy.shape(dense, f"down{suffix}") == (32, neurons)
    for key in anatomy:
        assert anatomy.shape(*key) == anatomy.weight(*key).shape
    assert anatomy.hidden_size == 32
    assert anatomy.vocabulary == 300


def test_neurons_are_of_blocks_not_of_experts(make_model, architecture):
    anatomy = Anatomy(make_model(architecture))
    if any(anatomy.experts(layer) for layer in range(3)):
        with pytest.raises(ModelError, match="mixture of experts"):
            _ = anatomy.n_neurons
    else:
        assert anatomy.n_neurons == (128 if architecture == "bloom" else 48)


def test_stacks_cover_all_blocks(make_model, architecture):
    model = make_model(architecture)
    anatomy = Anatomy(model)
    assert anatomy.encoder_decoder == (architecture == "mt5")
    assert [(s.first, s.stop) for s in anatomy.stacks] == ([(0, 2), (2, 4)] if architecture == "mt5" else [(0, 3)])
    for stack in anatomy.stacks:
        module = model.get_submodule(stack.path)
        assert anatomy.stack_module(stack) is module
        assert list(module.get_submodule(stack.blocks)) == anatomy.blocks[stack.first : stack.stop]
        assert isinstance(module.get_submodule(stack.norm), nn.Module)
        assert {anatomy.stack_of(layer) for layer in range(stack.first, stack.stop)} == {stack}


@pytest.mark.parametrize("kind", [*COUSINS, *DISCOVERED])
def test_a_relative_is_read_like_the_others(make_model, kind):
    model = make_model(kind)
    anatomy = Anatomy(model)
    check_sites(model, anatomy)
    check_groups(model, anatomy)
    check_everything_is_covered(model, anatomy)
    check_logits(model, anatomy)


def test_sites_run_in_their_order(make_model, architecture):
    model = make_model(architecture)
    anatomy = Anatomy(model)
    seen = watch_sites(model, anatomy)
    places = [anatomy.path(layer, site) for layer in range(len(anatomy.blocks)) for site in anatomy.sites(layer)]
    assert list(seen) == [path for path, _ in groupby(places)]


def test_weight_times_input_is_the_projections_part_of_the_output(make_model, architecture):
    model = make_model(architecture)
    check_sites(model, Anatomy(model))


def check_sites(model, anatomy):
    seen = watch_sites(model, anatomy)
    for layer in range(len(anatomy.blocks)):
        for role in set(anatomy.sites(layer)) & set(ROLES):
            path = anatomy.path(layer, role)
            module = model.get_submodule(path)
            value, output = seen[path]
            bias = getattr(module, "bias", None)
            part = None if bias is None else anatomy.site(layer, role, bias)
            torch.testing.assert_close(
                linear(value, anatomy.weight(layer, role), part), anatomy.site(layer, role, output)
            )
        check_mlp(anatomy, layer, seen)


def check_mlp(anatomy, layer, seen):
    """The activation is that of gate, or of up where there is none, and down reads its product with up."""
    if "activation" not in anatomy.sites(layer):
        return

    def output(site):
        return anatomy.site(layer, site, seen[anatomy.path(layer, site)][1])

    into_activation, activation = seen[anatomy.path(layer, "activation")]
    into_down = seen[anatomy.path(layer, "down")][0]
    if anatomy.has_gate(layer):
        assert torch.equal(into_activation, output("gate"))
        assert torch.equal(into_down, activation * output("up"))
    else:
        assert torch.equal(into_activation, output("up"))
        assert torch.equal(into_down, activation)


@pytest.mark.parametrize("kind", ["phi3", "gpt_neox", "gpt2", "llama"])
def test_attention_uses_the_parts_as_queries_keys_and_values(make_model, kind, monkeypatch):
    """Of texts of one token, so that rotary embeddings turn nothing."""
    model = make_model(kind)
    anatomy = Anatomy(model)
    ids = torch.arange(10, 30)[:, None]
    used = []
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, *arguments, **keywords):
        used.append([part.transpose(1, 2).flatten(2) for part in (query, key, value)])
        return attend(module, query, key, value, *arguments, **keywords)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    with watched({layer: model.get_submodule(anatomy.path(layer, "q")) for layer in range(3)}) as seen:
        run(model, ids)
    for layer in range(3):
        value = seen[layer][0]
        for role, part in zip("qkv", used[layer], strict=True):
            bias = getattr(model.get_submodule(anatomy.path(layer, role)), "bias", None)
            bias = None if bias is None else anatomy.site(layer, role, bias)
            torch.testing.assert_close(linear(value, anatomy.weight(layer, role), bias), part)


def test_bloom_splits_as_its_own_attention_does(make_model):
    model = make_model("bloom")
    anatomy = Anatomy(model)
    fused = torch.randn(2, 5, 96)
    for role, part in zip("qkv", anatomy.module(0, "self_attention")._reshape(fused), strict=True):
        assert torch.equal(anatomy.site(0, role, fused), part.transpose(1, 2).flatten(2))


def test_a_weight_is_written_where_it_belongs_and_nowhere_else(make_model, architecture):
    model = make_model(architecture)
    anatomy = Anatomy(model)
    for number, key in enumerate(anatomy):
        before = parameters(model)
        old = anatomy.weight(*key).clone()
        new = torch.arange(old.numel()).reshape(old.shape) + 1e6 * (number + 1)
        anatomy.set_weight(*key, new)
        assert torch.equal(anatomy.weight(*key), new)
        changed = {name: value != before[name] for name, value in parameters(model).items()}
        assert sum(int(where.sum()) for where in changed.values()) == old.numel()
        anatomy.set_weight(*key, old)
        assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_a_weight_of_another_shape_is_not_written(make_model, kind):
    anatomy = Anatomy(make_model(kind))
    with pytest.raises(RuntimeError):
        anatomy.set_weight(0, "down", anatomy.weight(0, "down").T.contiguous())
    with pytest.raises(RuntimeError):
        anatomy.set_weight(0, "q", torch.zeros(32, 33))


def test_weights_are_live_views_but_for_interleaved_ones(make_model, architecture):
    model = make_model(architecture)
    anatomy = Anatomy(model)
    for layer, role in anatomy:
        before = anatomy.weight(layer, role).clone()
        anatomy.weight(layer, role).add_(1)
        copied = architecture in ("gpt_neox", "bloom") and role in ("q", "k", "v")
        assert torch.equal(anatomy.weight(layer, role), before if copied else before + 1)


def test_roles_cover_every_matrix_of_the_blocks_but_routers(make_model, architecture):
    model = make_model(architecture)
    check_everything_is_covered(model, Anatomy(model))


def check_everything_is_covered(model, anatomy):
    kept = ("mlp.gate.weight", "shared_expert_gate.weight", "relative_attention_bias.weight")
    matrices = {
        f"{anatomy.path(layer, 'residual')}.{name}": parameter
        for layer, block in enumerate(anatomy.blocks)
        for name, parameter in block.named_parameters()
        if parameter.ndim > 1 and not name.endswith(kept)
    }
    assert anatomy.block_parameters().keys() == matrices.keys()
    assert sum(anatomy.weight(*key).numel() for key in anatomy) == sum(p.numel() for p in matrices.values())


def test_values_of_parameters_are_cut_as_the_weights_are(make_model, architecture):
    anatomy = Anatomy(make_model(architecture))
    parts = anatomy.by_projection({name: parameter.detach() for name, parameter in anatomy.block_parameters().items()})
    assert list(parts) == list(anatomy)
    assert all(torch.equal(part, anatomy.weight(*key)) for key, part in parts.items())
    name, *_ = anatomy.block_parameters()
    assert {layer for layer, _ in anatomy.by_projection({name: anatomy.block_parameters()[name].detach()})} == {0}


def test_groups_are_the_projections_that_share_an_input(make_model, architecture):
    model = make_model(architecture)
    check_groups(model, Anatomy(model))


def check_groups(model, anatomy):
    for layer in range(len(anatomy.blocks)):
        groups = anatomy.groups(layer)
        assert sorted(role for group in groups for role in group.roles) == sorted(anatomy.roles(layer))
        modules = {group.module: anatomy.module(layer, group.module) for group in groups}
        with watched(modules) as seen:
            run(model)
        assert list(seen) == list(modules)
        inputs = watch_sites(model, anatomy)
        leaders = []
        for group in (group for group in groups if group.expert is None):
            leaders.append(seen[group.module][0])
            assert group.leader == min(group.roles, key=anatomy.roles(layer).index)
            for role in group.roles:
                assert torch.equal(inputs[anatomy.path(layer, role)][0], leaders[-1])
        for group, other in combinations(range(len(leaders)), 2):
            parallel = {groups[group].leader, groups[other].leader} <= {"q", "gate", "up"}  # attention beside the MLP
            assert parallel or not torch.equal(leaders[group], leaders[other])


def test_groups_of_a_gated_and_an_ungated_block(make_model):
    assert Anatomy(make_model("llama")).groups(0) == (
        InputGroup(("q", "k", "v"), "self_attn.q_proj"),
        InputGroup(("o",), "self_attn.o_proj"),
        InputGroup(("gate", "up"), "mlp.gate_proj"),
        InputGroup(("down",), "mlp.down_proj"),
    )
    assert Anatomy(make_model("gpt2")).groups(0) == (
        InputGroup(("q", "k", "v"), "attn.c_attn"),
        InputGroup(("o",), "attn.c_proj"),
        InputGroup(("up",), "mlp.c_fc"),
        InputGroup(("down",), "mlp.c_proj"),
    )


def test_groups_of_a_decoder_that_looks_at_an_encoder(make_model):
    anatomy = Anatomy(make_model("mt5"))
    assert [group.roles for group in anatomy.groups(3)] == [
        ("q", "k", "v"),
        ("o",),
        ("cross_q",),
        ("cross_k", "cross_v"),
        ("cross_o",),
        ("gate", "up"),
        ("down",),
    ]
    assert "cross_k" not in anatomy.roles(1)


def test_groups_of_experts(make_model):
    groups = Anatomy(make_model("qwen2_moe")).groups(1)
    assert [group.roles for group in groups[:4]] == [
        ("q", "k", "v"),
        ("o",),
        ("shared_gate", "shared_up"),
        ("shared_down",),
    ]
    assert groups[4] == InputGroup(("gate.0", "up.0"), "mlp.experts", expert=0)
    assert groups[-1] == InputGroup(("down.3",), "mlp.experts", expert=3, inner=True)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_experts_parts_together_are_the_expert(make_model, kind):
    anatomy = Anatomy(make_model(kind))
    layer = 2
    experts = anatomy.experts(layer)
    x = torch.randn(6, 32)
    for e in range(4):
        gate, up, down = (anatomy.weight(layer, f"{role}.{e}") for role in ("gate", "up", "down"))
        inner = experts.act_fn(x @ gate.T) * (x @ up.T)
        torch.testing.assert_close(anatomy.expert_inner(layer, e, x), inner)
        with torch.no_grad():
            chosen = experts(x, torch.full((6, 1), e), torch.ones(6, 1))
        torch.testing.assert_close(chosen, inner @ down.T)


def test_an_expert_is_computed_with_its_present_weights(make_model):
    anatomy = Anatomy(make_model("mixtral"))
    anatomy.set_weight(0, "up.2", torch.zeros(48, 32))
    assert torch.count_nonzero(anatomy.expert_inner(0, 2, torch.randn(3, 32))) == 0
    assert torch.count_nonzero(anatomy.expert_inner(0, 1, torch.randn(3, 32))) > 0


def test_flattened_values_come_back_in_their_shape(make_model):
    model = make_model("opt")
    anatomy = Anatomy(model)
    _, flat = watch_sites(model, anatomy)[anatomy.path(1, "activation")]
    assert flat.shape == (18, 48)
    assert torch.equal(anatomy.site(1, "activation", flat, (2, 9)), flat.reshape(2, 9, 48))


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_are_those_of_the_models_own_forward(make_model, architecture, seed):
    model = make_model(architecture, seed)
    check_logits(model, Anatomy(model))


def check_logits(model, anatomy):
    with watched({"final": model.get_submodule(anatomy.final_norm_path)}) as seen:
        expected = run(model).logits
    hidden = seen["final"][1]
    with torch.no_grad():
        torch.testing.assert_close(anatomy.logits(hidden), expected)
        torch.testing.assert_close(anatomy.logits(hidden, slice(10, 20)), expected[..., 10:20])


def test_a_scaled_head_is_known(make_model):
    model = make_model("granite", logits_scaling=8.0)
    check_logits(model, Anatomy(model))


def test_opt_without_a_last_norm(make_model):
    model = make_model("opt", do_layer_norm_before=False, word_embed_proj_dim=16)  # as OPT-350M
    anatomy = Anatomy(model)
    assert anatomy.final_norm_path == "model.decoder.project_out"
    check_logits(model, anatomy)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_neox", "gpt2", "qwen2_moe", "mt5", "olmo2"])
def test_shapes_need_no_values(make_model, kind):
    model = make_model(kind)
    shapes = {key: Anatomy(model).shape(*key) for key in Anatomy(model)}
    empty = Anatomy(make_model(kind).to("meta"))
    assert {key: empty.shape(*key) for key in empty} == shapes
    assert [empty.groups(layer) for layer in range(3)] == [Anatomy(model).groups(layer) for layer in range(3)]


def test_fingerprint_tells_models_apart_and_not_copies(make_model, architecture):
    one, same, other = make_model(architecture), make_model(architecture), make_model(architecture, seed=1)
    prints = [Anatomy(model).fingerprint() for model in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    layer, role = list(Anatomy(same))[-1]
    Anatomy(same).set_weight(layer, role, torch.zeros(Anatomy(same).shape(layer, role)))
    assert Anatomy(same).fingerprint() != prints[0]


def test_a_models_fingerprint_is_the_same_in_every_version(make_model):
    model = make_model("llama")
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        values = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
        parameter.data.copy_(values % 97 + number)
    assert Anatomy(model).fingerprint() == "edc9fce2a20762ba9bda48e0bdada6b9df56ed6afeef148061c65cbb0a033766"


def test_parameters_are_those_of_the_blocks_and_the_others(make_model, architecture):
    model = make_model(architecture)
    anatomy = Anatomy(model)
    inside = [name for layer in range(len(anatomy.blocks)) for name in anatomy.parameter_names(layer)]
    names = [*inside, *anatomy.other_names()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert set(anatomy.block_parameters()) <= set(inside)
    assert anatomy.other_numel == sum(p.numel() for p in model.parameters()) - sum(
        model.get_parameter(name).numel() for name in inside
    )
    assert anatomy.element_size == 4
    assert anatomy.device == torch.device("cpu")
    assert not anatomy.streamed
    with anatomy.loaded(0), anatomy.loaded_for_start():  # all there anyway
        assert not anatomy.weight(0, "q").is_meta


def test_what_an_encoder_hands_over_is_normed(make_model):
    model = make_model("mt5")
    anatomy = Anatomy(model)
    last = anatomy.path(1, "residual")
    with watched({"block": model.get_submodule(last), "encoder": model.encoder.final_layer_norm}) as seen:
        run(model)
    assert torch.equal(anatomy.encoded(seen["block"][1]), seen["encoder"][1])


# What is refused.


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("falcon", '"self_attention.query_key_value" in its blocks is several projections in one'),
        ("glm4", '"mlp.gate_up_proj" in its blocks is several projections in one'),
        ("gpt_bigcode", '"attn.c_attn" in its blocks is several projections in one'),
        ("deepseek_v3", '"self_attn.q_a_proj.weight" in its blocks (of a Linear) is none of q k v o gate up down'),
        ("olmoe", '"mlp.gate.weight" in its blocks (of a OlmoeTopKRouter) is none of'),
        ("mamba", "its blocks have no attention"),
        ("jamba", "block 1 has other parts than block 0"),
        ("trocr", 'both "self_attn.k_proj" and "encoder_attn.k_proj" in its blocks could be k'),
        ("bart", "it has several lists of blocks (model.encoder.layers, model.decoder.layers)"),
    ],
)
def test_doubtful_architectures_are_refused_with_the_reason(make_model, kind, reason):
    with pytest.raises(ModelError) as caught:
        Anatomy(make_model(kind))
    message = str(caught.value)
    assert message.startswith(f'unknown model architecture "{kind}": {reason}')
    assert message.endswith("describe it with pruning.register_architecture")
    assert "\n" not in message


def test_names_that_lie_are_noticed(make_model):
    """q reads something of its own; gate and up have each other's names; the head does more than it says."""
    model = make_model("olmo2")
    for block in model.model.layers:
        block.self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    with pytest.raises(ModelError, match="q and k of block 0 do not read the same input"):
        Anatomy(model)
    model = make_model("olmo2")
    for block in model.model.layers:
        block.mlp.gate_proj, block.mlp.up_proj = block.mlp.up_proj, block.mlp.gate_proj
        block.mlp.forward = lambda x, mlp=block.mlp: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))
    with pytest.raises(ModelError, match="the activation of block 0 does not read the output of gate"):
        Anatomy(model)
    model = make_model("olmo2")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ModelError, match=r'its logits are not its head times the output of "model.norm"'):
        Anatomy(model)
    model = make_model("olmo2")
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ModelError, match="activation of block 1 did not run"):
        Anatomy(model)
    model = make_model("olmo2")
    model.model.forward = lambda *arguments, **keywords: 1 / 0
    with pytest.raises(ModelError, match=r"two tokens did not pass through it \(division by zero\)"):
        Anatomy(model)


def test_what_runs_first_comes_first_in_an_unknown_architecture(make_model):
    assert Anatomy(make_model("biogpt")).sites(0) == (
        "q",
        "k",
        "v",
        "heads",
        "o",
        "up",
        "activation",
        "down",
        "residual",
    )
    model = make_model("olmo2")
    for block in model.model.layers:
        block.mlp.forward = lambda x, mlp=block.mlp: mlp.down_proj(mlp.up_proj(x) * mlp.act_fn(mlp.gate_proj(x)))
    anatomy = Anatomy(model)
    assert anatomy.sites(0) == ("q", "k", "v", "heads", "o", "up", "gate", "activation", "down", "residual")
    assert anatomy.groups(0)[2] == InputGroup(("up", "gate"), "mlp.up_proj")


def test_a_model_without_its_parts_is_refused(make_model):
    model = make_model("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(ModelError, match=r'this "llama" model has no part "model.layers.1.mlp.up_proj"'):
        Anatomy(model)
    with pytest.raises(ModelError, match=r'no part "transformer.h".*AutoModelForCausalLM'):
        Anatomy(AutoModel.from_config(make_model("gpt2").config))
    headless = AutoModelForSequenceClassification.from_config(make_model("llama").config)
    with pytest.raises(ModelError, match="has no language modelling head"):
        Anatomy(headless).logits(torch.randn(2, 32))


def test_an_architecture_can_be_added(make_model, monkeypatch):
    monkeypatch.setattr(architectures, "_LAYOUTS", dict(architectures._LAYOUTS))
    sites = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": Fused("mlp.gate_up_proj", 0),
        "up": Fused("mlp.gate_up_proj", 1),
        "activation": "mlp.activation_fn",
        "down": "mlp.down_proj",
    }
    register_architecture("glm4", Layout(sites))
    assert "glm4" in supported_architectures()
    model = make_model("glm4")
    anatomy = Anatomy(model)
    check_sites(model, anatomy)
    check_groups(model, anatomy)
    check_everything_is_covered(model, anatomy)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout({"q": Fused("self_attn.q_proj", 0, "heads"), "o": "self_attn.o_proj"}), "cannot be cut into roles"),
        (Layout({"o": "self_attn.o_proj", "up": "mlp.up_proj", "down": "self_attn.o_proj"}), "down of block 0"),
        (Layout({"o": "self_attn.o_proj", "up": "mlp.down_proj"}), "up of block 0 .* has 32 outputs and 48 inputs"),
        (Layout({"o": "self_attn.o_proj"}, experts=Experts("mlp")), 'not stored as "gate_up_proj" and "down_proj"'),
        (Layout({"o": "attention.o_proj"}), 'no part "model.layers.0.attention.o_proj"'),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(make_model, monkeypatch, layout, message):
    monkeypatch.setattr(architectures, "_LAYOUTS", {"llama": (layout,)})
    with pytest.raises(ModelError, match=message):
        Anatomy(make_model("llama"))
