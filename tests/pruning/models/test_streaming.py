"""A model whose weights stay on disk is, to the bit, the model loaded whole."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from checkpoints import CORPUS, SHORT, change_index, change_tensors, checkpoint, saved, shards
from conftest import ARCHITECTURES
from safetensors.torch import load_file

from pruning import Anatomy, Recipe, load_model, prune
from pruning.errors import ModelError, RecipeError
from pruning.models.checkpoint import INDEX, SINGLE, Shards

RECIPES = [
    Recipe(method="wanda", sparsity=0.5),
    Recipe(method="sparsegpt", sparsity=0.5),
    Recipe(method="wanda", sparsity=0.5, allocation="owl"),
    Recipe(method="magnitude", sparsity=0.5, allocation="alpha"),
]
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return checkpoint(tmp_path / "model")


def both(folder, dtype="float32"):
    return [load_model(str(folder), stream=stream, dtype=dtype, device="cpu")[0] for stream in (True, False)]


def assert_prunes_the_same(streamed, whole, tokenizer, recipes=RECIPES):
    assert Anatomy(streamed).fingerprint() == Anatomy(whole).fingerprint()
    made = [prune(model, tokenizer, recipes, CORPUS, SHORT, name="model") for model in (streamed, whole)]
    for one, other in zip(*made, strict=True):
        assert one.record == other.record
        assert one.masks == other.masks, one.id
        assert one.values.keys() == other.values.keys()
        assert all(torch.equal(one.values[key], other.values[key]) for key in one.values), one.id
    assert all(parameter.is_meta for parameter in streamed.parameters())


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "t5"])
def test_streamed_model_is_pruned_as_the_whole_one(tmp_path, tokenizer, kind):
    folder = checkpoint(tmp_path, kind)
    assert len(shards(folder)) > 2
    assert_prunes_the_same(*both(folder), tokenizer)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mixtral", "model.layers.{}.block_sparse_moe.experts.{}.w{}.weight"),
        ("qwen2_moe", "model.layers.{}.mlp.experts.{}.{}_proj.weight"),
        ("qwen3_moe", "model.layers.{}.mlp.experts.{}.{}_proj.weight"),
    ],
)
def test_experts_that_are_stored_one_by_one_are_put_where_the_model_has_them(tmp_path, kind, names):
    folder = checkpoint(tmp_path, kind)
    stored = {name: tensor for shard in shards(folder) for name, tensor in load_file(shard).items()}
    anatomy = Anatomy(load_model(str(folder), stream=True, dtype="bfloat16", device="cpu")[0])
    for expert in range(4):
        for role, part in (("gate", "1"), ("up", "3"), ("down", "2")):
            own = stored[names.format(2, expert, part if kind == "mixtral" else role)]
            for to_read in (True, False):
                with anatomy.loaded(2, to_read=to_read):
                    assert torch.equal(anatomy.weight(2, f"{role}.{expert}"), own.bfloat16())


def test_experts_are_not_held_twice_on_the_way(tmp_path):
    """They are copied straight from their shards, so nothing beside the block is ever as large as one of its parameters."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            found = function(*arguments, **(named or {}))
            if isinstance(found, torch.Tensor) and found.numel() == whole and not found._is_view():
                self.made += function not in (torch.ops.aten.detach.default, torch.ops.aten.copy_.default)
            return found

    anatomy = Anatomy(load_model(str(checkpoint(tmp_path, "mixtral")), stream=True, device="cpu")[0])
    whole = anatomy.experts(1).gate_up_proj.numel()
    with Largest() as largest, anatomy.loaded(1):
        pass
    assert largest.made == 1


@pytest.mark.parametrize(
    ("kind", "stored", "wanted"),
    [
        ("llama", torch.bfloat16, "bfloat16"),
        ("gemma3_text", torch.bfloat16, "float32"),
        ("qwen3_moe", torch.float16, "checkpoint"),
        ("mt5", torch.float16, "float16"),  # parts of which transformers keeps in float32
    ],
)
def test_streamed_model_has_the_dtypes_of_the_whole_one(tmp_path, make_model, tokenizer, kind, stored, wanted):
    folder = saved(make_model(kind).to(stored), tmp_path)
    streamed, whole = both(folder, wanted)
    assert streamed.dtype == whole.dtype
    assert_prunes_the_same(streamed, whole, tokenizer, RECIPES[1:2])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
def test_heads_that_are_tied_and_not(tmp_path, tokenizer, kind, tied):
    folder = checkpoint(tmp_path, kind, tie_word_embeddings=tied)
    assert ("lm_head.weight" in Shards(folder).files) is not tied
    assert_prunes_the_same(*both(folder), tokenizer, RECIPES[:1])


def test_a_checkpoint_in_one_file_or_without_a_prefix_streams_too(tmp_path, make_model, tokenizer):
    from safetensors.torch import save_file

    model = make_model("gpt2")
    saved(model, tmp_path, shard="1GB")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / SINGLE).items()}
    save_file(bare, tmp_path / SINGLE, {"format": "pt"})  # as the first GPT-2 was published
    assert_prunes_the_same(*both(tmp_path), tokenizer, RECIPES[:1])


def test_buffers_have_the_values_of_the_checkpoint(tmp_path, model, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    build = LlamaModel.__init__

    def with_buffer(self, config):
        build(self, config)
        self.register_buffer("scale", torch.ones(3))

    monkeypatch.setattr(LlamaModel, "__init__", with_buffer)
    model.model.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
    streamed, whole = both(saved(model, tmp_path))
    assert streamed.model.scale.tolist() == whole.model.scale.tolist() == [1, 2, 3]
    assert torch.equal(streamed.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)


def test_parameters_are_there_only_inside_and_leave_also_after_an_error(folder):
    streamed, whole = both(folder)
    anatomy = Anatomy(streamed)
    with pytest.raises(RuntimeError, match="on purpose"), anatomy.loaded(1):
        assert torch.equal(anatomy.weight(1, "up"), Anatomy(whole).weight(1, "up"))
        assert anatomy.weight(0, "up").is_meta
        with anatomy.loaded(1, to_read=True), anatomy.loaded_for_start():
            assert not streamed.model.embed_tokens.weight.is_meta
        assert not anatomy.weight(1, "up").is_meta
        raise RuntimeError("on purpose")
    assert all(parameter.is_meta for parameter in streamed.parameters())


def test_a_streamed_model_is_freed_when_nobody_holds_it_any_more(folder):
    model, _ = load_model(str(folder), stream=True, device="cpu")
    with Anatomy(model).loaded(1):
        pass
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_writing_to_streamed_weights_never_reaches_the_checkpoint(folder):
    anatomy = Anatomy(load_model(str(folder), stream=True, dtype="checkpoint", device="cpu")[0])
    before = [path.read_bytes() for path in shards(folder)]
    with anatomy.loaded(1):
        anatomy.weight(1, "up").zero_()
    assert [path.read_bytes() for path in shards(folder)] == before
    with anatomy.loaded(1, to_read=True):
        assert anatomy.weight(1, "up").any()


def elsewhere(file):
    """Have the index name another file for a tensor, which is there in the folder above, and whole."""

    def damage(folder):
        (folder.parent / "x.safetensors").write_bytes(shards(folder)[0].read_bytes())
        change_index(folder, lambda index: index["weight_map"].update({WEIGHT: file}))

    return damage


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shards(f)[2].unlink(), "lacks 1 of its 7 shards (model-00003-of-00007.safetensors)"),
        (lambda f: shards(f)[2].write_bytes(shards(f)[2].read_bytes()[:-50]), "model-00003-of-00007.safetensors is"),
        (lambda f: shards(f)[2].write_bytes(b""), "model-00003-of-00007.safetensors is damaged"),
        (lambda f: change_index(f, lambda i: i["weight_map"].update({WEIGHT: "x.safetensors"})), "(x.safetensors)"),
        (lambda f: change_index(f, lambda i: i["weight_map"].update({WEIGHT: 3})), f"{INDEX} is damaged"),
        (lambda f: change_index(f, lambda i: i.pop("weight_map")), f"{INDEX} is damaged"),
        (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is damaged"),
        (lambda f: (f / INDEX).write_text("3"), f"{INDEX} is damaged"),
        (lambda f: (f / INDEX).write_text("[" * 99_999), f"{INDEX} is damaged"),
        (lambda f: change_index(f, lambda i: i.update(weight_map=[])), f"{INDEX} is damaged"),
        (lambda f: change_index(f, lambda i: i.update(weight_map={})), f"{INDEX} is damaged"),
        (elsewhere("../x.safetensors"), 'names "../x.safetensors", which is not a file in its folder'),
        (elsewhere("/x.safetensors"), 'names "/x.safetensors", which is not a file in its folder'),
        (elsewhere("x/../../x.safetensors"), "which is not a file in its folder"),
        (elsewhere("..\\x.safetensors"), "which is not a file in its folder"),
        (elsewhere("x" * 5000), "xxx…xxx"),
        (lambda f: (f / INDEX).unlink(), f"no {SINGLE}"),
        (lambda f: change_tensors(f, WEIGHT, lambda t: t.pop(WEIGHT)), f"lacks {WEIGHT}, which {INDEX} says"),
        (
            lambda f: change_tensors(f, WEIGHT, lambda t: t.update({WEIGHT: t[WEIGHT][:10].clone()})),
            "shape (10, 32)",
        ),
    ],
    ids=[
        "missing shard",
        "shard cut short",
        "empty shard",
        "index names another file",
        "index names no file",
        "index without a map",
        "index cut short",
        "index is a number",
        "index is nested too deeply",
        "map is a list",
        "map is empty",
        "index names a file in the folder above",
        "index names a file by an absolute path",
        "index names a file by a way out",
        "index names a file in the folder above on Windows",
        "index names a very long file",
        "no index",
        "tensor missing",
        "tensor of another shape",
    ],
)
def test_damaged_checkpoints_are_one_clear_line(folder, stream, damage, words):
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), stream=stream, device="cpu")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_parameter_that_is_nowhere_is_one_clear_line(folder, stream):
    change_tensors(folder, WEIGHT, lambda tensors: tensors.pop(WEIGHT))
    change_index(folder, lambda index: index["weight_map"].pop(WEIGHT))
    with pytest.raises(ModelError, match=f"lacks {WEIGHT}; download") as caught:
        load_model(str(folder), stream=stream, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("change", [lambda t, n: t.pop(n), lambda t, n: t.update({n: t[n][:5].clone()})])
def test_experts_that_do_not_fit_together_are_one_clear_line(tmp_path, stream, change):
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    folder = checkpoint(tmp_path, "mixtral")
    change_tensors(folder, name, lambda tensors: change(tensors, name))
    change_index(
        folder, lambda index: None if name in load_file(_shard(folder, name)) else index["weight_map"].pop(name)
    )
    with pytest.raises(ModelError, match=r"not fit together|incomplete or inconsistent"):
        load_model(str(folder), stream=stream, device="cpu")


def _shard(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def test_a_quantized_checkpoint_is_not_streamed(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="is quantized"):
        load_model(str(folder), stream=True)


def test_what_needs_the_whole_model_says_so(folder, tokenizer):
    streamed, whole = both(folder)
    with pytest.raises(RecipeError, match="snip differentiates the loss, so the whole model must be in memory"):
        prune(streamed, tokenizer, Recipe(method="snip", sparsity=0.5), CORPUS, SHORT)
    (variant,) = prune(whole, tokenizer, Recipe(method="magnitude", sparsity=0.5))
    with pytest.raises(ModelError, match="load it whole"):
        variant.apply(streamed)
    with pytest.raises(ModelError, match="load it whole"), variant.applied(streamed):
        pass
