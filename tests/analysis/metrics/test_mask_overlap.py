from __future__ import annotations

from itertools import combinations, combinations_with_replacement, product

import numpy as np
import pytest
import torch
from conftest import tiny_model
from matplotlib.text import Text
from scipy.stats import t
from torch.utils._python_dispatch import TorchDispatchMode

from analysis import plots
from analysis.metrics import mask_overlap
from analysis.report.findings import _masks
from pruning import Anatomy, CalibrationSet, MaskSet, Recipe, Variant
from pruning.errors import VariantError
from pruning.text.calibration import Drawn
from pruning.variants.masks import overlaps
from pruning.variants.store import VariantRecord

BASE = {
    "model": "m",
    "method": "wanda",
    "sparsity": 0.5,
    "pattern": "row",
    "allocation": "uniform",
    "scope": "all",
    "propagation": "pruned",
    "item_share": 0.0,
    "bits": 9.0,
}


def columns(calibration, seed=0, **other):
    return BASE | {"calibration": calibration, "seed": seed} | other


def random_set(seed: int, density: float = 0.5) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    return MaskSet.pack(
        {(layer, role): torch.rand(200, 300, generator=generator) < density for layer in range(2) for role in "qk"}
    )


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_independent_masks_overlap_at_chance(density):
    masks = {"a": random_set(0, density), "b": random_set(1, density)}
    frame = mask_overlap.analyze(masks, {"a": columns("en"), "b": columns("sw")})
    table = frame.pivot_table(index=["layer", "role"], columns="metric", values="value", observed=True)
    assert len(table) == 4
    assert (table["iou"] - table["iou_chance"]).abs().max() < 0.01
    assert table["iou_chance"].mean() == pytest.approx(density / (2 - density), abs=0.01)  # (1 − s)/(1 + s)


def test_equal_masks_overlap_wholly_and_known_ones_as_known():
    left, right = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    left[:, :4], right[:, 2:6] = True, True  # 2 of 6 in both
    masks = {
        "a": MaskSet.pack({(0, "q"): left}),
        "b": MaskSet.pack({(0, "q"): left}),
        "c": MaskSet.pack({(0, "q"): right}),
    }
    frame = mask_overlap.analyze(masks, {name: columns(name) for name in masks})
    iou = frame[frame["metric"] == "iou"].set_index(["calibration", "other_calibration"])["value"]
    assert iou.to_dict() == {
        ("a", "b"): 1.0,
        ("a", "c"): pytest.approx(1 / 3),
        ("b", "c"): pytest.approx(1 / 3),
    }


def test_only_variants_of_one_recipe_are_compared():
    masks = {name: random_set(i) for i, name in enumerate("abcd")}
    which = {
        "a": columns("en"),
        "b": columns("en", seed=1),
        "c": columns("sw", sparsity=0.3),
        "d": columns("none", method="magnitude"),
    }
    frame = mask_overlap.analyze(masks, which)
    pairs = frame[["calibration", "seed", "other_calibration", "other_seed"]].drop_duplicates()
    assert pairs.to_numpy().tolist() == [["en", 0, "en", 1]]


def test_overlaps_are_those_of_sets():
    masks = [random_set(seed, density) for seed, density in enumerate((0.2, 0.5, 0.9))]
    found = overlaps(masks)
    for key in masks[0]:
        sets = [set(mask[key].flatten().nonzero().flatten().tolist()) for mask in masks]
        for i, j in combinations(range(3), 2):
            assert found[key][i, j] == found[key][j, i] == len(sets[i] & sets[j])
            assert masks[i].iou(masks[j])[key] == len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        assert np.diagonal(found[key]).tolist() == [len(one) for one in sets]


def test_masks_of_different_models_are_not_compared():
    with pytest.raises(VariantError, match="different models"):
        overlaps([random_set(0), MaskSet.pack({(0, "q"): torch.ones(2, 8, dtype=torch.bool)})])


def test_sets_that_share_more_weights_are_clustered_first():
    one, other = random_set(0), random_set(1)
    masks = {"ar": one, "de": other, "en": one & random_set(2, 0.98), "es": other & random_set(3, 0.98)}
    frame = mask_overlap.analyze(masks, {name: columns(name) for name in masks})
    matrix = mask_overlap.mean_matrix(frame)
    assert np.allclose(matrix, matrix.T, equal_nan=True)
    tree = mask_overlap.cluster(matrix)
    assert {frozenset(map(int, row[:2])) for row in tree[:2]} == {frozenset({0, 2}), frozenset({1, 3})}
    assert tree[2, 2] > 5 * tree[:2, 2].max()


def test_sets_are_compared_over_all_their_draws():
    frame = drawn(3)
    matrix = mask_overlap.set_matrix(frame)
    assert list(matrix.index) == list(matrix.columns) == ["en", "sw", "zh"]
    rows = frame[frame["metric"] == "iou"].astype({"calibration": str, "other_calibration": str})
    for one, other in combinations_with_replacement(matrix.index, 2):
        pairs = rows[
            [{a, b} == {one, other} for a, b in zip(rows["calibration"], rows["other_calibration"], strict=True)]
        ]
        assert len(pairs.groupby(["seed", "other_seed", "calibration"])) == (3 if one == other else 9)
        assert matrix.loc[one, other] == matrix.loc[other, one] == pytest.approx(pairs["value"].mean())
    assert mask_overlap.set_matrix(drawn(1)).to_numpy().diagonal() == pytest.approx(np.full(3, np.nan), nan_ok=True)
    assert plots.mask_overlap.heatmap(drawn(2, ["en"]), columns("en"))  # one set: its draws


def drawn(draws, sets=("en", "sw", "zh")):
    """Masks of draws of each set that are more like those of their set than of others, and a recipe's frame of them."""
    masks, which = {}, {}
    for number, name in enumerate(sets):
        own = random_set(10 * number, 0.7)
        for draw in range(draws):
            masks[f"{name}{draw}"] = own & random_set(100 * number + draw + 1, 0.7 + draw / 20)
            which[f"{name}{draw}"] = columns(name, seed=draw)
    return mask_overlap.analyze(masks, which)


def plain_means(frame, without=None):
    """Mean IoU within and between sets, sets counting alike, by grouping the rows."""
    rows = frame[frame["metric"] == "iou"].astype({"calibration": str, "other_calibration": str})
    one = list(zip(rows["calibration"], rows["seed"], strict=True))
    other = list(zip(rows["other_calibration"], rows["other_seed"], strict=True))
    rows = rows[[without not in pair for pair in zip(one, other, strict=True)]]
    pairs = rows.groupby(rows[["calibration", "other_calibration"]].apply(frozenset, axis=1))["value"].mean()
    same = [value for sets, value in pairs.items() if len(sets) == 1]
    different = [value for sets, value in pairs.items() if len(sets) == 2]
    return np.array([np.mean(same), np.mean(different), np.mean(same) - np.mean(different)])


def test_mean_overlaps_leave_out_draws_not_pairs():
    frame = drawn(3)
    found = mask_overlap.mean_overlaps(frame)
    variances = []
    for name in ("en", "sw", "zh"):
        without = np.stack([plain_means(frame, (name, seed)) for seed in range(3)])
        variances.append(2 / 3 * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    df = np.sum(variances, axis=0) ** 2 / (np.square(variances) / 2).sum(axis=0)
    margin = t.ppf(0.975, df) * np.sqrt(np.sum(variances, axis=0))
    value = plain_means(frame)
    np.testing.assert_allclose(found, np.stack([value, value - margin, value + margin], axis=1))
    assert found.same[0] > found.different[0]
    assert found.difference[1] > 0


@pytest.mark.parametrize(("draws", "known"), [(1, []), (2, ["different"]), (3, ["same", "different", "difference"])])
def test_an_interval_within_sets_takes_three_draws_and_one_between_them_two(draws, known):
    found = mask_overlap.mean_overlaps(drawn(draws))._asdict()
    assert [name for name, (_, low, _) in found.items() if np.isfinite(low)] == known
    assert np.isfinite(found["different"][0])
    assert np.isfinite(found["same"][0]) == (draws > 1)


def test_the_report_says_how_overlaps_vary_over_draws():
    recipe = {name: value for name, value in BASE.items() if name != "model"}
    for draws in (2, 3):
        frame = drawn(draws)
        within, between, apart = mask_overlap.mean_overlaps(frame)
        said = " ".join(_masks({"mask_overlap": frame}, recipe))
        interval = f" [{within[1]:.3f}, {within[2]:.3f}]" if draws == 3 else ""
        assert f"same calibration set overlap with a mean IoU of {within[0]:.3f}{interval} (chance" in said
        assert f"sets overlap with a mean IoU of {between[0]:.3f} [{between[1]:.3f}, {between[2]:.3f}] (chance" in said
        last = f"more than draws of different sets: the difference is {apart[0]:.3f} [{apart[1]:.3f}, {apart[2]:.3f}]"
        assert (last in said) == (draws == 3)


def test_rows_say_what_text_two_draws_share():
    text = {
        name: (Drawn(language="en", pool="p", tokens=ranges),)
        for name, ranges in (("a", ((0, 40),)), ("b", ((40, 80),)), ("c", ((0, 10), (70, 100))))
    }
    masks = {name: random_set(i) for i, name in enumerate([*text, "unknown"])}
    described = {name: columns("en", seed) for seed, name in enumerate(masks)}
    frame = mask_overlap.analyze(masks, described, text)
    shared = frame.groupby(["seed", "other_seed"])["shared_text"].agg(["min", "max"])
    assert (shared["min"].dropna() == shared["max"].dropna()).all()
    assert shared["max"].dropna().to_dict() == {(0, 1): 0, (0, 2): 0.25, (1, 2): 0.25}
    assert shared["max"].isna().sum() == 3  # with what is unknown
    assert mask_overlap.draws_share(frame) == 0.25
    assert mask_overlap.draws_share(frame.assign(other_calibration="sw")) == 0
    recipe = {name: value for name, value in BASE.items() if name != "model"}
    for rows, expected in (
        (frame, "(ceiling; up to 25% of the text shared)"),
        (frame.assign(shared_text=0.0), "(ceiling)"),
    ):
        drawn = {text.get_text() for text in plots.mask_overlap.roles(rows, recipe).findobj(Text)}
        assert any(found.endswith(expected) for found in drawn)


def corrected(dense: Anatomy, name: str, kept: float, correction: dict[tuple[int, str], torch.Tensor]) -> Variant:
    generator = torch.Generator().manual_seed(len(name))
    masks, values = {}, {}
    for key, change in correction.items():
        masks[key] = torch.rand(change.shape, generator=generator) < kept
        values[key] = (dense.weight(*key) + change)[masks[key]]
    recipe = Recipe(method="sparsegpt", sparsity=0.5)
    record = VariantRecord(
        id=name, model="m", model_fingerprint="f", recipe=recipe, calibration=CalibrationSet.named(name, samples=1)
    )
    return Variant(record, MaskSet.pack(masks), values)


def test_corrections_agree_as_planted():
    dense = Anatomy(tiny_model())
    random = torch.Generator().manual_seed(0)
    keys = [(0, "q"), (2, "down")]
    one = {key: 0.01 * torch.randn(dense.shape(*key), generator=random) for key in keys}
    turned = {key: -change for key, change in one.items()}
    other = {key: 0.01 * torch.randn(dense.shape(*key), generator=random) for key in keys}
    variants = [
        corrected(dense, name, 0.6, change)
        for name, change in (("en", one), ("sw", one), ("zh", turned), ("de", other))
    ]
    frame = mask_overlap.agreement(variants, dense)
    found = frame[frame["metric"] == "correction_cosine"].groupby(["calibration", "other_calibration"], observed=True)
    cosine = found["value"].mean()
    assert cosine["en", "sw"] == pytest.approx(1, abs=1e-4)
    assert cosine["en", "zh"] == pytest.approx(-1, abs=1e-4)
    assert abs(cosine["en", "de"]) < 0.15
    assert (frame[frame["metric"] == "value_cosine"]["value"] <= 1 + 1e-6).all()


def naive_cosine(one: torch.Tensor, other: torch.Tensor, both: torch.Tensor) -> float:
    one, other = one[both].double(), other[both].double()
    return float((one * other).sum() / (one.square().sum() * other.square().sum()).sqrt())


@pytest.mark.parametrize("at_a_time", [1, 500, 1 << 23], ids=["a row", "some rows", "everything"])
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "on disk"])
def test_agreement_is_that_of_whole_matrices_however_many_rows_are_compared_at_a_time(
    tmp_path, monkeypatch, at_a_time, saved
):
    monkeypatch.setattr(mask_overlap, "_AT_A_TIME", at_a_time)
    monkeypatch.setattr(mask_overlap, "_READ", max(at_a_time, 700))
    dense = Anatomy(tiny_model(intermediate_size=50))  # not a number of whole bytes
    random = torch.Generator().manual_seed(0)
    changes = [
        {(1, role): 0.05 * torch.randn(dense.shape(1, role), generator=random) for role in ("up", "down")}
        for _ in range(3)
    ]
    variants = [
        corrected(dense, name, kept, change)
        for name, kept, change in zip(("en", "sw-KE", "zh-Hans"), (0.3, 0.6, 0.9), changes, strict=True)
    ]
    if saved:
        for variant in variants:
            variant.save(tmp_path / variant.id)
        variants = [Variant.open(tmp_path / variant.id) for variant in variants]
    frame = mask_overlap.agreement(variants, dense)
    found = frame.set_index(["metric", "role", "calibration", "other_calibration"])["value"]
    assert len(found) == 2 * 2 * 3
    for role, (one, other) in product(("up", "down"), combinations(variants, 2)):
        before = dense.weight(1, role)
        both = one.masks[1, role] & other.masks[1, role]
        weights = [variant.weight((1, role), before) for variant in (one, other)]
        assert found["value_cosine", role, one.id, other.id] == pytest.approx(naive_cosine(*weights, both), rel=1e-5)
        corrections = [weight - before for weight in weights]
        expected = naive_cosine(*corrections, both)
        assert found["correction_cosine", role, one.id, other.id] == pytest.approx(expected, rel=1e-4, abs=1e-6)


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation returns, views of a model's weights aside."""

    elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **named or {})
        if isinstance(result, torch.Tensor) and not operation.is_view:
            self.elements = max(self.elements, result.numel())
        return result


def test_comparing_variants_holds_no_whole_matrix_of_any(monkeypatch):
    dense = Anatomy(tiny_model())
    change = {(1, "up"): torch.full(dense.shape(1, "up"), 0.01)}
    variants = [corrected(dense, name, 0.5, change) for name in ("en", "sw", "zh", "de")]
    rows, (_, inputs) = 4, dense.shape(1, "up")
    monkeypatch.setattr(mask_overlap, "_AT_A_TIME", len(variants) * rows * inputs)
    monkeypatch.setattr(mask_overlap, "_READ", len(variants) * rows * inputs)
    with Largest() as largest:
        mask_overlap.agreement(variants, dense)
    assert 0 < largest.elements <= len(variants) * rows * inputs < dense.weight(1, "up").numel()


def test_uncorrected_weights_have_no_agreement_to_measure():
    dense = Anatomy(tiny_model())
    record = VariantRecord(id="a", model="m", model_fingerprint="f")
    plain = Variant(record, MaskSet.pack({(0, "q"): torch.ones(dense.shape(0, "q"), dtype=torch.bool)}), {})
    assert len(mask_overlap.agreement([plain, plain], dense)) == 0
