"""Compare the results of two study folders: frames within a relative tolerance, masks bit for bit.

    python tests/benchmarks/compare_frames.py OLD NEW [--tolerance 1e-5]

prints for every frame its rows and the largest relative difference, for every variant whether its masks are the same,
and ends with status 1 if anything differs. A frame ``neurons`` that only the old folder has is held against what
``lape.neurons`` makes of the new folder's readings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import load_file

#: Columns that were measured; all others say what of.
MEASURED = ("value", "low", "high", "n", "draws", "df", "p_value", "p_adjusted", "shared_text")
#: Differences of numbers below this share of a metric's root mean square count relative to that share.
SMALL = 1e-2


@dataclass(frozen=True)
class Compared:
    """What came of comparing one thing: what it is, how large, the largest relative difference, and a remark."""

    what: str
    size: int
    difference: float
    remark: str = ""

    def line(self, tolerance: float) -> str:
        """Return it in one line."""
        verdict = "same" if self.difference <= tolerance else "DIFFERS"
        return f"{verdict:8} {self.what:60} {self.size:>9}  {self.difference:.2g}  {self.remark}".rstrip()


def compare(old: Path, new: Path) -> Iterator[Compared]:
    """Yield how two study folders compare, frame by frame and variant by variant."""
    for folder, pattern in (("frames", "*.parquet"), ("diagnoses", "*/recovery.parquet")):
        before = {path.relative_to(old): path for path in sorted((old / folder).glob(pattern))}
        after = {path.relative_to(new): path for path in sorted((new / folder).glob(pattern))}
        for name, path in before.items():
            if name in after:
                yield frames(str(name), pd.read_parquet(path), pd.read_parquet(after[name]))
            elif name.stem == "neurons":
                yield frames(f"{name} (made of the new readings)", pd.read_parquet(path), _neurons(new))
            else:
                yield Compared(str(name), 0, np.inf, "is not in the new folder")
        for name in after.keys() - before.keys():
            yield Compared(str(name), len(pd.read_parquet(after[name])), 0.0, "is in the new folder only")
    variants = {path.name for root in (old, new) for path in (root / "variants").glob("*") if path.is_dir()}
    for name in sorted(variants):
        for file in ("masks.safetensors", "weights.safetensors"):
            one, other = (root / "variants" / name / file for root in (old, new))
            if one.is_file() or other.is_file() or file.startswith("masks"):
                yield tensors(f"variants/{name}/{file}", one, other)


def frames(name: str, one: pd.DataFrame, other: pd.DataFrame) -> Compared:
    """Compare two frames, row by row of the same keys."""
    keys = [column for column in one.columns if column not in MEASURED]
    if sorted(one.columns) != sorted(other.columns):
        return Compared(name, len(one), np.inf, f"columns {sorted(set(one.columns) ^ set(other.columns))}")
    one, other = (_by_key(frame, keys) for frame in (one, other))
    if not one.index.equals(other.index):
        missing = len(one.index.symmetric_difference(other.index))
        return Compared(name, len(one), np.inf, f"{len(one)} and {len(other)} rows, {missing} only in one of them")
    largest, where = 0.0, ""
    metrics = one.index.get_level_values("metric")
    for column in (column for column in MEASURED if column in one):
        a, b = (frame[column].to_numpy(dtype=np.float64) for frame in (one, other))
        difference = relative_differences(a, b, metrics)
        if len(difference) and difference.max() > largest:
            worst = int(difference.argmax())
            largest = float(difference[worst])
            where = f"{column} of {metrics[worst]}: {a[worst]:.7g} and {b[worst]:.7g}"
    return Compared(name, len(one), largest, where)


def relative_differences(a: np.ndarray, b: np.ndarray, metrics: pd.Index) -> np.ndarray:
    """Return |a − b| over the larger of both, or over a small share of the metric's size where both are smaller."""
    with np.errstate(invalid="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        difference = np.abs(a - b)
    finite = np.where(np.isfinite(a), a, 0.0)
    size = pd.Series(finite**2).groupby(np.asarray(metrics)).transform("mean").to_numpy() ** 0.5
    scale = np.maximum(np.maximum(np.abs(a), np.abs(b)), SMALL * size)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(same, 0.0, np.nan_to_num(difference / scale, nan=np.inf))


def tensors(name: str, one: Path, other: Path) -> Compared:
    """Compare two files of tensors: packed masks exactly, weights relative to the largest of their matrix."""
    if not (one.is_file() and other.is_file()):
        return Compared(name, 0, np.inf, "is in one of the folders only")
    before, after = load_file(one), load_file(other)
    if before.keys() != after.keys() or any(before[key].shape != after[key].shape for key in before):
        return Compared(name, len(before), np.inf, "has other projections or shapes")
    largest = 0.0
    for key, value in before.items():
        if value.dtype.is_floating_point:
            a, b = value.double(), after[key].double()
            largest = max(largest, float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) if len(a) else 0.0)
        elif not value.equal(after[key]):
            return Compared(name, len(before), np.inf, f"other bits in {key}")
    return Compared(name, len(before), largest)


def _by_key(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return a frame indexed by its keys, which are made comparable: empty ones are a word."""
    columns = {key: frame[key].astype(object).where(frame[key].notna(), "").astype(str) for key in keys}
    rows = frame[[column for column in MEASURED if column in frame]].set_index(
        pd.MultiIndex.from_frame(pd.DataFrame(columns))
    )
    number = rows.groupby(level=keys, sort=False).cumcount()  # rows of equal keys stay apart, in their order
    return rows.set_index(number.rename("number"), append=True).sort_index()


def _neurons(folder: Path) -> pd.DataFrame:
    from analysis import lape, open_readings

    return lape.neurons(*open_readings(folder))


def main() -> int:
    """Compare two folders named on the command line."""
    parser = argparse.ArgumentParser(description="Compare frames and masks of two study folders.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference; 1e-5 by default")
    chosen = parser.parse_args()
    worst = 0.0
    for compared in compare(chosen.old, chosen.new):
        print(compared.line(chosen.tolerance), flush=True)
        worst = max(worst, compared.difference)
    print(f"largest relative difference: {worst:.2g}")
    return int(worst > chosen.tolerance)


if __name__ == "__main__":
    sys.exit(main())
