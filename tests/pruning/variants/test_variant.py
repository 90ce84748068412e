from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import CORPUS, SHORT, checkpoint, saved

from pruning import Anatomy, CalibrationSet, Recipe, Variant, load_model, prune
from pruning.errors import DiskError, RecipeError, VariantError

WANDA, SPARSEGPT = Recipe(method="wanda", sparsity=0.5), Recipe(method="sparsegpt", sparsity=0.5)


@pytest.fixture
def variant(model, tokenizer):
    return prune(model, tokenizer, WANDA, CORPUS, SHORT)[0]


@pytest.fixture
def corrected(model, tokenizer):
    return prune(model, tokenizer, SPARSEGPT, CORPUS, SHORT)[0]


@pytest.fixture(params=["variant", "corrected"])
def any_variant(request):
    return request.getfixturevalue(request.param)


def test_dense_model_is_restored_bit_for_bit(model, any_variant):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with any_variant.applied(model):
        weight = Anatomy(model).weight(0, "q")
        assert int((weight == 0).sum()) == weight.numel() // 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def negative_zeros(weight: torch.Tensor) -> int:
    return int(((weight == 0) & weight.signbit()).sum())


@pytest.mark.parametrize("kind", ["llama", "bloom", "phi3", "gpt2"])
def test_a_weight_is_written_where_it_is_wanted_and_its_zeros_are_positive(make_model, tokenizer, kind):
    model = make_model(kind)
    anatomy = Anatomy(model)
    for variant in prune(model, tokenizer, [WANDA, SPARSEGPT], CORPUS, SHORT):
        for key in anatomy:
            dense = anatomy.weight(*key)
            wanted = torch.where(variant.masks[key], dense, torch.zeros(()))
            if key in variant.values:
                wanted[variant.masks[key]] = variant.values[key]
            wide = torch.full((2, *dense.T.shape), 7.0)
            variant.write(key, dense, wide[1].T)  # a view of transposed storage, such as GPT-2's
            assert torch.equal(wide[1].T, wanted)
            assert bool((wide[0] == 7).all())
            assert torch.equal(variant.weight(key, dense), wanted)
            assert negative_zeros(wide[1]) == negative_zeros(variant.weight(key, dense)) == 0
            masks, pieces = zip(*variant.pieces(key, dense, rows=5), strict=True)
            assert torch.equal(torch.cat(pieces), wanted)
            assert np.array_equal(np.concatenate(masks), variant.masks.packed(key))
            assert not any(map(negative_zeros, pieces))


def test_a_projection_out_of_scope_is_written_as_it_is(model, tokenizer):
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.5, blocks="1:"))
    dense = Anatomy(model).weight(0, "q")
    out = torch.empty_like(dense)
    variant.write((0, "q"), dense, out)
    assert torch.equal(out, dense)


def test_dense_model_is_restored_when_the_block_fails(model, any_variant):
    before = Anatomy(model).weight(1, "down").clone()
    with pytest.raises(RuntimeError, match="on purpose"), any_variant.applied(model):
        raise RuntimeError("on purpose")
    assert torch.equal(Anatomy(model).weight(1, "down"), before)


def test_saved_variant_opens(tmp_path, any_variant, model):
    any_variant.save(tmp_path / "v")
    opened = Variant.open(tmp_path / "v", Anatomy(model).fingerprint())
    assert opened.record == any_variant.record
    assert opened.masks == any_variant.masks
    assert dict(opened.values).keys() == any_variant.values.keys()
    assert all(torch.equal(opened.values[key], value) for key, value in any_variant.values.items())


def test_a_saved_variant_replaces_a_variant_and_nothing_else(tmp_path, variant, corrected):
    place = tmp_path / "v"
    corrected.save(place)
    variant.save(place)
    assert {path.name for path in place.iterdir()} == {"recipe.json", "masks.safetensors"}
    (place / "recipe.json").unlink()  # as a message may have asked for
    variant.save(place)
    (place / "notes.txt").write_text("precious")
    with pytest.raises(DiskError, match=r"contains files that prunescope did not write"):
        variant.save(place)
    assert (place / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["recipe.json", "masks.safetensors"])
@pytest.mark.parametrize("content", ['{"soup": ["carrots"]}', "no JSON", "[]"])
def test_a_folder_of_the_same_file_names_is_no_variant(tmp_path, variant, name, content):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / name).write_text(content)
    with pytest.raises(DiskError, match="did not write"):
        variant.save(tmp_path / "v")
    assert (tmp_path / "v" / name).read_text() == content


def test_equal_variants_are_equal_bytes(tmp_path, model, tokenizer):
    for name in ("one", "other"):
        prune(model, tokenizer, SPARSEGPT, CORPUS, SHORT)[0].save(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_variant_of_another_model_is_refused(tmp_path, variant, make_model):
    variant.save(tmp_path / "v")
    other = make_model(seed=5)
    with pytest.raises(VariantError, match="belongs to another model"):
        Variant.open(tmp_path / "v", Anatomy(other).fingerprint())
    with pytest.raises(VariantError, match="belongs to another model"), variant.applied(other):
        pass


def test_variant_cannot_be_applied_twice(model, any_variant):
    any_variant.apply(model)
    with pytest.raises(VariantError, match="is already pruned"):
        any_variant.apply(model)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1, 2]", '{"id": 3', '{"id": "a", "model": "m", "model_fingerprint": "f", "recipe": 3}']
)
def test_damaged_recipe_is_refused(tmp_path, variant, content):
    variant.save(tmp_path / "v")
    (tmp_path / "v" / "recipe.json").write_text(content)
    with pytest.raises(VariantError, match="damaged") as caught:
        Variant.open(tmp_path / "v")
    assert "\n" not in str(caught.value)


def test_a_method_that_is_not_registered_is_named(tmp_path, variant):
    variant.save(tmp_path / "v")
    path = tmp_path / "v" / "recipe.json"
    path.write_text(path.read_text().replace('"wanda"', '"my-own"'))
    with pytest.raises(VariantError, match='unknown method "my-own"'):
        Variant.open(tmp_path / "v")


@pytest.mark.parametrize("size", [0, 7, 100, -8])
def test_damaged_weights_are_refused(tmp_path, corrected, size):
    corrected.save(tmp_path / "v")
    path = tmp_path / "v" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(VariantError, match=r"weights.safetensors is damaged"):
        Variant.open(tmp_path / "v")


def test_weights_that_do_not_fit_the_masks_are_refused(tmp_path, model, tokenizer, corrected):
    corrected.save(tmp_path / "v")
    other = prune(model, tokenizer, Recipe(method="sparsegpt", sparsity=0.25), CORPUS, SHORT)[0]
    other.save(tmp_path / "w")
    (tmp_path / "w" / "weights.safetensors").replace(tmp_path / "v" / "weights.safetensors")
    with pytest.raises(VariantError, match="does not match the variant's masks"):
        Variant.open(tmp_path / "v")


def test_missing_variant_is_refused(tmp_path):
    with pytest.raises(VariantError, match="no pruned variant"):
        Variant.open(tmp_path)


def test_export_never_overwrites(tmp_path, model, tokenizer, variant):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DiskError, match="not empty"):
        variant.export(model, tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_export_of_another_model_is_refused(tmp_path, make_model, tokenizer, variant):
    with pytest.raises(VariantError, match="belongs to another model"):
        variant.export(make_model(seed=5), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"samples": 4}, {"length": 24}])
def test_two_variants_never_share_a_name(model, tokenizer, change):
    other = SHORT.model_copy(update=change)
    with pytest.raises(RecipeError, match=r'two variants would be called "wanda-0.5-row-pruned-en\+sw-s0"'):
        prune(model, tokenizer, WANDA, CORPUS, [SHORT, other])


def test_a_recipe_without_text_makes_one_variant(model, tokenizer):
    recipes = [Recipe(method="magnitude", sparsity=0.5), WANDA]
    sets = [CalibrationSet.named(name, samples=2, length=16) for name in ("en", "sw")]
    names = [variant.id for variant in prune(model, tokenizer, recipes, CORPUS, sets)]
    assert names == ["magnitude-0.5-matrix", "wanda-0.5-row-pruned-en-s0", "wanda-0.5-row-pruned-sw-s0"]


# Models that were pruned elsewhere


def pruned_copy(make_model, variant, kind="llama"):
    model = make_model(kind)
    variant.apply(model)
    return model


@pytest.mark.parametrize("recipe", [WANDA, SPARSEGPT], ids=["masked", "corrected"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "phi3", "qwen2_moe", "mt5"])
def test_a_model_pruned_elsewhere_is_taken_over_to_the_bit(make_model, tokenizer, kind, recipe):
    dense = make_model(kind)
    variant = prune(dense, tokenizer, recipe, CORPUS, SHORT)[0]
    taken = Variant.between(dense, pruned_copy(make_model, variant, kind), "theirs")
    assert taken.masks == variant.masks
    assert taken.values.keys() == variant.values.keys()
    assert all(torch.equal(taken.values[key], value) for key, value in variant.values.items())
    assert taken.columns() | {"model": "m"} == {
        "model": "m",
        "method": "theirs",
        "sparsity": 0.5,
        "pattern": "unknown",
        "allocation": "unknown",
        "scope": "all",
        "propagation": "none",
        "item_share": 0.0,
        "bits": 9.0,
        "calibration": "none",
        "seed": 0,
    }


def test_projections_that_were_left_alone_are_not_in_the_masks(make_model, tokenizer):
    dense = make_model()
    variant = prune(dense, tokenizer, Recipe(method="magnitude", sparsity=0.5, roles=("o",), blocks="1:"))[0]
    taken = Variant.between(dense, pruned_copy(make_model, variant), "theirs")
    assert set(taken.masks) == {(1, "o"), (2, "o")}
    assert taken.columns()["sparsity"] == 0.5


def test_an_unchanged_model_is_refused_even_if_the_dense_one_has_zeros(make_model):
    dense, same = make_model(), make_model()
    with pytest.raises(VariantError, match="it is not pruned, quantized or trained"):
        Variant.between(dense, same, "same")
    for model in (dense, same):
        Anatomy(model).weight(0, "q")[:, ::2] = 0
    with pytest.raises(VariantError, match="it is not pruned, quantized or trained"):
        Variant.between(dense, same, "same")


def test_swapped_models_are_noticed_but_not_zeros_that_were_regrown(make_model, tokenizer):
    (variant,) = prune(make_model(), tokenizer, Recipe(method="magnitude", sparsity=0.5))
    pruned = pruned_copy(make_model, variant)
    with pytest.raises(VariantError, match="were the dense and the pruned model swapped"):
        Variant.between(pruned, make_model(), "theirs")
    grown = make_model()
    zeros = 0
    for key in Anatomy(grown):
        Anatomy(grown).weight(*key).mul_(1.5)  # trained on, and nothing held at zero
        zeros += int((Anatomy(pruned).weight(*key) == 0).sum())
    taken = Variant.between(pruned, grown, "theirs")
    assert (len(taken.masks), taken.columns()["pattern"], taken.bits()) == (0, "changed", 16)
    assert "changed: 100.0% of the weights of 21 matrices have other values, none was removed" in taken.record.found
    assert f"; {zeros:,} weights that are zero in the dense model are not" in taken.record.found


def trained(model, keys=None):
    random = torch.Generator().manual_seed(3)
    anatomy = Anatomy(model)
    for key in keys or anatomy:
        weight = anatomy.weight(*key).clone()
        update = torch.randn(len(weight), 2, generator=random) @ torch.randn(2, weight.shape[1], generator=random)
        anatomy.set_weight(*key, weight + 0.01 * update)  # such as a merged LoRA
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "phi3", "mixtral"])
def test_a_model_trained_elsewhere_is_taken_over_to_the_bit_without_masks(tmp_path, make_model, tokenizer, kind):
    dense, other = make_model(kind), trained(make_model(kind))
    taken = Variant.between(dense, other, "theirs")
    assert len(taken.masks) == 0
    assert taken.columns()["pattern"] == "changed"
    assert (taken.columns()["sparsity"], taken.columns()["bits"]) == (0.0, 16.0)
    assert taken.record.found.startswith("changed: 100.0% of the weights of ")
    taken.save(tmp_path / "v")
    assert {path.name for path in (tmp_path / "v").iterdir()} == {"recipe.json", "weights.safetensors"}
    opened = Variant.open(tmp_path / "v", Anatomy(dense).fingerprint())
    assert opened.projections == taken.projections == tuple(Anatomy(dense))
    with opened.applied(dense):
        for key in Anatomy(other):
            assert torch.equal(Anatomy(dense).weight(*key), Anatomy(other).weight(*key))


def test_what_was_pruned_and_trained_has_masks_and_values(make_model, tokenizer, variant):
    other = trained(pruned_copy(make_model, variant))
    for key in Anatomy(other):
        Anatomy(other).weight(*key).mul_(variant.masks[key])  # zeros stay
    taken = Variant.between(make_model(), other, "theirs")
    assert taken.masks == variant.masks
    assert taken.values.keys() == variant.masks.keys()
    assert taken.record.found == "pruned: 50.0% of the weights of 21 matrices are newly zero, 50.0% have other values"
    plain = Variant.between(make_model(), pruned_copy(make_model, variant), "theirs").record
    assert plain.found == "pruned: 50.0% of the weights of 21 matrices are newly zero, the others are the dense model's"


def test_a_few_accidental_zeros_do_not_make_a_trained_model_pruned(make_model):
    other = trained(make_model())
    Anatomy(other).weight(0, "up")[3, 4] = 0
    taken = Variant.between(make_model(), other, "theirs")
    assert len(taken.masks) == 0
    assert float(taken.weight((0, "up"), Anatomy(make_model()).weight(0, "up"))[3, 4]) == 0


def test_part_of_a_model_may_be_pruned_and_part_trained(tmp_path, make_model, tokenizer):
    dense = make_model()
    (pruned,) = prune(dense, tokenizer, Recipe(method="magnitude", sparsity=0.5, roles=("up",)))
    other = trained(pruned_copy(make_model, pruned), keys=[(1, "q")])
    taken = Variant.between(dense, other, "theirs")
    taken.save(tmp_path / "v")
    opened = Variant.open(tmp_path / "v")
    assert opened.projections == ((0, "up"), (1, "up"), (1, "q"), (2, "up"))
    for key in Anatomy(dense):
        assert torch.equal(opened.weight(key, Anatomy(dense).weight(*key)), Anatomy(other).weight(*key))


def test_weights_on_a_grid_are_taken_for_quantized_ones_and_pruned_ones_are_not(make_model, tokenizer):
    wide = {"hidden_size": 128, "intermediate_size": 256}
    dense = make_model(**wide)
    recipes = [Recipe(method="rtn", bits=4, group=g, roles=("q", "up", "down")) for g in (128, 32)]
    for recipe in [*recipes, Recipe(method="magnitude", sparsity=0.9), Recipe(method="magnitude", pattern="3:4")]:
        (variant,) = prune(dense, tokenizer, recipe)
        other = make_model(**wide)
        variant.apply(other)
        taken = Variant.between(dense, other, "theirs")
        quantized = recipe.quantizes
        assert taken.record.found.startswith("quantized: " if quantized else "pruned: ")
        assert taken.columns()["pattern"] == ("quantized" if quantized else "unknown")
        for key in variant.projections:
            assert torch.equal(taken.weight(key, Anatomy(dense).weight(*key)), Anatomy(other).weight(*key))


def test_our_own_quantized_export_comes_back_as_what_it_is(tmp_path):
    dense, tokenizer = load_model(str(checkpoint(tmp_path / "model")), dtype="float32", device="cpu")
    (variant,) = prune(dense, tokenizer, Recipe(method="gptq", bits=3, group=8), CORPUS, SHORT)
    variant.export(dense, tokenizer, tmp_path / "export")
    other, _ = load_model(str(tmp_path / "export"), dtype="float32", device="cpu")
    taken = Variant.between(dense, other, "again")
    assert taken.columns() == variant.columns()
    assert len(taken.masks) == 0
    key = (1, "down")
    assert torch.equal(taken.values[key], variant.codes[key].unpacked().weight())


@pytest.mark.parametrize(
    "other", [("llama", {"intermediate_size": 40}), ("llama", {"vocab_size": 301}), ("qwen2", {}), ("gpt2", {})]
)
def test_another_architecture_or_size_is_refused(make_model, tokenizer, other):
    kind, settings = other
    with pytest.raises(VariantError, match="its parameters or their shapes differ"):
        Variant.between(make_model(), make_model(kind, **settings), "theirs")


def test_rounding_beside_the_projections_does_no_harm(make_model, variant):
    other = pruned_copy(make_model, variant).bfloat16().float()
    taken = Variant.between(make_model(), other, "theirs")
    assert taken.masks == variant.masks
    assert taken.values.keys() == variant.masks.keys()  # rounded, so other than the dense ones
    assert not taken.others


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_our_own_export_comes_back_as_what_it_is(tmp_path, stream):
    folder = checkpoint(tmp_path / "model")
    dense, tokenizer = load_model(str(folder), dtype="float32", device="cpu", stream=stream)
    recipe = Recipe(method="sparsegpt", sparsity=0.5, roles=("q", "down"), blocks=":2")
    (variant,) = prune(dense, tokenizer, recipe, CORPUS, SHORT)
    variant.export(dense, tokenizer, tmp_path / "export")
    pruned, _ = load_model(str(tmp_path / "export"), dtype="float32", device="cpu", stream=stream)
    taken = Variant.between(dense, pruned, "again")
    assert taken.record == variant.record.model_copy(update={"id": "again", "key": ""})
    assert taken.columns() == variant.columns()
    assert taken.masks == variant.masks
    taken.save(tmp_path / "again")
    variant.save(tmp_path / "first")
    for name in ("masks.safetensors", "weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_a_recipe_of_another_dense_model_or_tool_is_left_aside(tmp_path, make_model, tokenizer, variant):
    saved(pruned_copy(make_model, variant), tmp_path)
    pruned, _ = load_model(str(tmp_path), dtype="float32", device="cpu")
    for content, remark in (
        ("{}", ()),
        ('{"stages": []}', ()),
        ("no JSON", ()),
        (
            json.dumps(variant.record.model_dump(mode="json") | {"model": "other/model", "model_fingerprint": "0"}),
            ("its recipe.json is ignored, since it belongs to another dense model (other/model)",),
        ),
    ):
        (tmp_path / "recipe.json").write_text(content)
        taken = Variant.between(make_model(), pruned, "theirs")
        assert taken.record.recipe is None
        assert taken.record.remarks == remark
