"""Models made elsewhere whose norms, embeddings, biases or head differ from the dense model's too."""

from __future__ import annotations

import weakref

import pytest
import torch
from checkpoints import CORPUS, SHORT, checkpoint, saved
from conftest import tiny_model
from torch import nn

from pruning import Anatomy, Recipe, Variant, load_model, prune
from pruning.errors import VariantError
from pruning.models.loading import load_weights
from pruning.variants.owner import DenseModel
from pruning.variants.store import VariantWriter

#: Tied and untied heads, fused projections, biases and norms of several kinds, routers, two stacks.
KINDS = ["llama", "gemma3_text", "gpt2", "bloom", "phi3", "opt", "qwen2_moe", "mt5"]


def changed(model, wanted=lambda name: True, seed=5):
    """Add noise to the parameters that are wanted; tied ones once."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if wanted(name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return model


def beside_projections(model):
    projections = Anatomy(model).block_parameters()
    return lambda name: name not in projections


def assert_same_models(one, other):
    theirs = dict(other.named_parameters(remove_duplicate=False))
    for name, parameter in one.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, theirs[name]), name


@pytest.fixture(params=KINDS)
def pair(request):
    """A dense model, and one in which everything is different."""
    return tiny_model(request.param), changed(tiny_model(request.param))


def test_the_whole_model_becomes_the_checkpoint_and_dense_again(tmp_path, pair):
    dense, other = pair
    before = {name: (parameter, parameter.clone()) for name, parameter in dense.named_parameters()}
    taken = Variant.between(dense, other, "theirs", tmp_path / "theirs")
    (tmp_path / "copy").mkdir()
    taken.save(tmp_path / "copy")
    fingerprint = Anatomy(dense).fingerprint()
    owner = DenseModel(dense)
    for variant in (taken, Variant.open(tmp_path / "copy", fingerprint), Variant.between(dense, other, "theirs")):
        for model_as in (variant.applied(dense), owner.pruned_to(variant)):
            with model_as:
                assert_same_models(dense, other)
            for name, parameter in dense.named_parameters():
                assert parameter is before[name][0]
                assert torch.equal(parameter, before[name][1])
    taken.apply(dense)
    assert_same_models(dense, other)


def test_only_what_differs_is_stored(tmp_path, pair):
    dense, _ = pair
    anatomy = Anatomy(dense)
    ties = anatomy.ties
    beside = [name for name in beside_names(anatomy) if name not in ties]
    for name in (beside[0], beside[-1], next(name for name in beside if "norm" in name or ".ln_" in name)):
        other = changed(tiny_model(anatomy.kind), lambda own, name=name: own == name)
        taken = Variant.between(dense, other, "theirs", tmp_path / "theirs")
        assert list(taken.others) == [name]
        assert (taken.projections, dict(taken.biases)) == ((), {})
        assert {path.name for path in (tmp_path / "theirs").iterdir()} >= {"recipe.json", "others.safetensors"}
        assert (taken.columns()["pattern"], taken.columns()["sparsity"], taken.bits()) == ("changed", 0.0, 16.0)
        assert torch.equal(taken.others[name], other.get_parameter(name))
        with taken.applied(dense):
            assert_same_models(dense, other)


def beside_names(anatomy):
    """Return everything but the projections and their biases, outside the blocks and inside."""
    biases = {f"{anatomy.path(*key)}.bias" for key in anatomy if key[1] in anatomy.sites(key[0])}
    inside = [name for layer in range(len(anatomy.blocks)) for name in anatomy.parameter_names(layer)]
    names = [*anatomy.other_names(), *inside]
    return [name for name in names if name not in biases and name not in anatomy.block_parameters()]


def test_what_was_found_is_said_with_its_size():
    dense, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for layer in (0, 2):
            other.model.layers[layer].input_layernorm.weight.mul_(1.5)
        other.lm_head.weight.mul_(0.9)
    said = Variant.between(dense, other, "theirs").record.found
    norms = [p for name, p in dense.named_parameters() if "norm" in name]
    two = [dense.model.layers[layer].input_layernorm.weight for layer in (0, 2)]
    share = 0.5 * torch.cat(two).norm() / torch.cat(norms).norm()
    assert said == (
        f"changed: no projection has other weights; also changed: 2 of 7 norm parameters (by {share:.2%}), "
        "the head (by 10.00%)"
    )


def test_what_was_pruned_and_trained_says_both(tokenizer):
    dense = tiny_model("qwen2")
    (variant,) = prune(dense, tokenizer, Recipe(method="magnitude", sparsity=0.5))
    other = tiny_model("qwen2")
    variant.apply(other)
    changed(other, beside_projections(other))
    taken = Variant.between(dense, other, "theirs")
    assert taken.masks == variant.masks
    assert not taken.values
    assert taken.record.found.startswith(
        "pruned: 50.0% of the weights of 21 matrices are newly zero, the others are the dense model's; also changed: "
    )
    for words in (
        "9 of 9 biases of projections (by ",
        "7 of 7 norm parameters (by ",
        "1 of 1 embeddings (",
        "the head (",
    ):
        assert words in taken.record.found


@pytest.mark.parametrize("kind", ["gemma3_text", "mt5", "llama", "mixtral", "gpt2"])
def test_models_in_their_shards_are_compared_and_exported_as_in_memory(tmp_path, kind, tokenizer):
    folders = checkpoint(tmp_path / "dense", kind), saved(changed(tiny_model(kind)), tmp_path / "other")
    taken = []
    for stream in (False, True):
        dense, other = (load_weights(str(folder), dtype="float32", device="cpu", stream=stream) for folder in folders)
        taken.append(Variant.between(dense, other, "theirs", tmp_path / f"{stream}"))
        export = tmp_path / f"export-{stream}"
        taken[-1].export(dense, tokenizer, export)
        assert "untouched" not in (export / "README.md").read_text()
        assert_same_models(load_model(str(export), device="cpu")[0], load_model(str(folders[1]), device="cpu")[0])
    files = [sorted(path.name for path in (tmp_path / f"{stream}").iterdir()) for stream in (False, True)]
    assert files[0] == files[1]
    for name in files[0]:
        if name != "recipe.json":
            assert (tmp_path / "False" / name).read_bytes() == (tmp_path / "True" / name).read_bytes()


@pytest.mark.parametrize("kind", ["gemma3_text", "cohere", "gpt2"])
def test_a_head_that_was_untied_is_taken_and_exported(tmp_path, kind, tokenizer):
    dense, other = tiny_model(kind), tiny_model(kind)
    head = other.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() * 1.25)
    other.config.tie_word_embeddings, other.all_tied_weights_keys = False, {}
    taken = Variant.between(dense, other, "theirs", tmp_path / "theirs")
    assert list(taken.others) == ["lm_head.weight"]
    assert taken.record.found.endswith("; also changed: the head (by 25.00%)")
    with taken.applied(dense):
        assert_same_models(dense, other)
    taken.export(dense, tokenizer, tmp_path / "export")
    again, _ = load_model(str(tmp_path / "export"), dtype="float32", device="cpu")
    assert_same_models(again, other)
    assert dense.config.tie_word_embeddings
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    saved(dense, tmp_path / "dense")
    streamed, _ = load_model(str(tmp_path / "dense"), dtype="float32", device="cpu", stream=True)
    with pytest.raises(VariantError, match="tied in the dense model; export it without --stream"):
        taken.export(streamed, tokenizer, tmp_path / "streamed")


def test_a_head_that_was_tied_has_the_embeddings(tmp_path):
    dense, other = tiny_model(), tiny_model()
    other.lm_head.weight = other.model.embed_tokens.weight
    other.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    taken = Variant.between(dense, other, "theirs")
    assert list(taken.others) == ["lm_head.weight"]
    with taken.applied(dense):
        assert_same_models(dense, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_a_16_bit_checkpoint_are_stored_in_16_bits(tmp_path, dtype):
    dense, other = tiny_model(), changed(tiny_model()).to(dtype).float()
    taken = Variant.between(dense, other, "theirs", tmp_path / "theirs")
    assert {taken.others[name].dtype for name in taken.others} == {dtype}
    with taken.applied(dense):
        assert_same_models(dense, other)


def test_biases_that_a_checkpoint_lacks_are_zeros():
    dense, other = tiny_model("qwen2"), tiny_model("qwen2")
    other.model.layers[1].self_attn.q_proj.bias = None
    taken = Variant.between(dense, other, "theirs")
    assert list(taken.biases) == [(1, "q")]
    assert torch.count_nonzero(taken.biases[1, "q"]) == 0


def test_a_model_that_computes_something_else_from_its_parameters_is_refused():
    longer = changed(tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}))
    with pytest.raises(VariantError, match=r"another rope_parameters in its configuration \(.*500000"):
        Variant.between(tiny_model(), longer, "longer")


def test_a_resized_vocabulary_is_refused_with_both_sizes():
    with pytest.raises(VariantError, match=r"its vocabulary has 301 tokens, not 300\); undo resize_token_embeddings"):
        Variant.between(tiny_model(), tiny_model(vocab_size=301), "larger")


def test_what_was_exported_and_trained_further_keeps_its_recipe(tmp_path, tokenizer):
    dense, tokenizer = load_model(str(checkpoint(tmp_path / "dense")), dtype="float32", device="cpu")
    (variant,) = prune(dense, tokenizer, Recipe(method="wanda", sparsity=0.5), CORPUS, SHORT)
    variant.export(dense, tokenizer, tmp_path / "export")
    other, _ = load_model(str(tmp_path / "export"), dtype="float32", device="cpu")
    with torch.no_grad():
        other.model.norm.weight.mul_(1.1)
    taken = Variant.between(dense, other, "further")
    assert taken.record.recipe == variant.record.recipe
    assert taken.record.remarks[-1].startswith("also changed: 1 of 7 norm parameters (by ")


def test_a_damaged_or_foreign_file_is_told(tmp_path):
    dense, other = tiny_model(), changed(tiny_model())
    Variant.between(dense, other, "theirs", tmp_path / "theirs")
    path = tmp_path / "theirs" / "others.safetensors"
    content = path.read_bytes()
    fingerprint = Anatomy(dense).fingerprint()
    path.write_bytes(content.replace(fingerprint.encode(), b"0" * 64))
    with pytest.raises(VariantError, match="is not a file of this variant"):
        Variant.open(tmp_path / "theirs")
    path.write_bytes(content[:-1])
    with pytest.raises(VariantError, match="is damaged"):
        Variant.open(tmp_path / "theirs")


def test_an_import_into_a_folder_holds_one_projection_at_a_time(tmp_path, monkeypatch):
    dense, other = tiny_model(), changed(tiny_model())
    alive: list[weakref.ref] = []
    most = []

    def watched(write):
        def add(writer, key, *tensors, **named):
            written = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
            most.append(sum(reference() is not None for reference in alive))
            alive.extend(weakref.ref(tensor) for tensor in written)
            write(writer, key, *tensors, **named)

        return add

    monkeypatch.setattr(VariantWriter, "add_values", watched(VariantWriter.add_values))
    Variant.between(dense, other.bfloat16().float(), "theirs", tmp_path / "theirs")
    assert len(most) == 21
    assert max(most) <= 1
