"""Files of language-specific subspaces, and recipes that name them."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pruning import CalibrationSet, Recipe, Subspaces
from pruning.errors import RecipeError
from pruning.input_parts import InputPart, PartSums


def bases(seed=0, hidden=8, blocks=3, rank=2):
    draws = torch.Generator().manual_seed(seed)
    return [torch.linalg.qr(torch.randn(hidden, rank, generator=draws))[0] for _ in range(blocks)]


@pytest.fixture
def file(tmp_path):
    return Subspaces.save(
        tmp_path / "subspaces.safetensors", bases(), model_fingerprint="4f", languages=("en", "sw", "zh")
    )


def test_a_file_has_the_bases_and_says_what_they_are_of(file):
    assert (file.languages, file.ranks, file.hidden, file.model_fingerprint) == (("en", "sw", "zh"), (2, 2, 2), 8, "4f")
    assert file.before(0) is None
    for layer, basis in enumerate(bases()[:2], start=1):
        assert torch.equal(file.before(layer), basis)
    assert Subspaces.open(file.path) == file


def test_the_hash_is_of_the_content_and_the_path_is_not_part_of_a_recipe(file, tmp_path):
    again = Subspaces.save(tmp_path / "b", bases(), model_fingerprint="4f", languages=("en", "sw", "zh"))
    other = Subspaces.save(tmp_path / "c", bases(1), model_fingerprint="4f", languages=("en", "sw", "zh"))
    assert again.sha256 == file.sha256 != other.sha256
    one, two = (
        Recipe(method="wanda", sparsity=0.5, parameters={"specific": 0}, subspaces=of).model_dump(mode="json")
        for of in (file, again)
    )
    assert one == two
    assert str(tmp_path) not in json.dumps(one)
    assert Recipe.model_validate(one).subspaces.languages == ("en", "sw", "zh")


def test_a_block_may_have_no_subspace(tmp_path):
    some = Subspaces.save(tmp_path / "s", [None, *bases()[1:]], model_fingerprint="4f", languages=("en", "sw"))
    assert some.ranks == (0, 2, 2)
    assert some.before(1) is None
    assert some.before(2) is not None


def test_names_and_columns_have_the_weight_and_the_start_of_the_hash(file):
    recipe = Recipe(method="wanda", sparsity=0.5, refinement="swaps", parameters={"specific": 0.25}, subspaces=file)
    start = file.sha256[:6]
    assert recipe.method_label == f"wanda(specific=0.25, subspaces={start})+swaps"
    name = recipe.variant_id(CalibrationSet.named("sw"))
    assert name == f"wanda+swaps-0.5-row-specific=0.25-subspaces={start}-pruned-sw-s0"
    trained = Recipe(method="wanda", sparsity=0.5, recover="lora", parameters={"specific": 0}, subspaces=file)
    assert trained.unrecovered.subspaces == file


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_sums_follow_for_any_weight_and_add_up(weight):
    draws = torch.Generator().manual_seed(2)
    (basis,), gain = bases(hidden=6, blocks=1), torch.rand(6, generator=draws) + 0.5
    shift = torch.randn(6, generator=draws)
    part = InputPart.of(basis, gain, shift)
    rows = torch.randn(40, 6, generator=draws)
    changed = (
        rows.double()
        - (1 - weight) * ((rows - shift) / gain).double() @ basis.double() @ (gain[:, None] * basis).double().T
    )
    sums = [PartSums(part) for _ in range(2)]
    sums[0].add(rows[:25])
    sums[1].add(rows[25:])
    both = sums[0] + sums[1]
    gram = both.gram(rows.T @ rows, weight)
    torch.testing.assert_close(gram.double(), changed.T @ changed, rtol=1e-4, atol=1e-4)
    squares = both.squares(rows.square().sum(dim=0), weight)
    torch.testing.assert_close(squares.double(), changed.square().sum(dim=0), rtol=1e-4, atol=1e-4)


def test_a_direction_that_a_centring_norm_takes_out_is_no_part():
    constant = torch.full((16, 1), 0.25)
    other = torch.linalg.qr(torch.eye(16)[:, :1] - 1 / 16)[0]
    part = InputPart.of(torch.cat([constant, other], dim=1), torch.ones(16), centred=True)
    assert part.writer.shape == (16, 1)
    torch.testing.assert_close(part.writer.abs(), other.abs())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "wanda", "parameters": {"specific": 0}}, "specific = 0 needs subspaces, the file that prunescope"),
        ({"method": "wanda", "parameters": {"specific": 1.5}}, r"specific = 1.5 is not between 0 and 1"),
        ({"method": "magnitude", "parameters": {"specific": 0}}, '"magnitude".* has no parameter "specific"'),
        ({"method": "m-wanda", "parameters": {"specific": 0}}, 'has no parameter "specific"'),
        ({"method": "gptq", "bits": 4, "parameters": {"specific": 0}}, 'has no parameter "specific"'),
    ],
)
def test_recipes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Recipe(**({} if "bits" in settings else {"sparsity": 0.5}), **settings)


def damaged(path, name):
    tensors, said = load_file(path), {"format": "prunescope-subspaces-1"}
    if name == "other":
        save_file(tensors, path, {"format": "pt"})
    elif name == "about":
        save_file(tensors, path, said)
    elif name == "content":
        content = path.read_bytes()
        path.write_bytes(content[:-4] + b"\0\0\0\0")
    elif name == "short":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", 'has no subspaces ("format" is not'),
        ("about", "is damaged ("),
        ("content", "is damaged (its content is not what it says)"),
        ("short", "is damaged ("),
        ("gone", "there is no file"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(file, tmp_path, name, message):
    path = tmp_path / "subspaces.safetensors"
    damaged(path, name)
    with pytest.raises(RecipeError) as caught:
        Subspaces.open(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "prunescope subspaces" in str(caught.value)


def test_bases_that_are_not_orthonormal_or_were_replaced_are_refused(file, tmp_path):
    with pytest.raises(RecipeError, match=r'basis "after\.0" is not orthonormal'):
        Subspaces.save(tmp_path / "b", [2 * basis for basis in bases()], model_fingerprint="4f", languages=("en", "sw"))
    Subspaces.save(tmp_path / "subspaces.safetensors", bases(1), model_fingerprint="4f", languages=("en", "sw"))
    with pytest.raises(RecipeError, match="was changed since it was opened"):
        file.before(1)
    (tmp_path / "subspaces.safetensors").unlink()
    with pytest.raises(RecipeError, match="any more"):
        file.before(1)
