"""The tidy schema: every frame, its columns and its metrics with unit and definition, checked on write and read.

Long format, one observation a row. The first columns say which model was measured, the next ones where, the last ones
what: ``metric, value`` and, where the value is an estimate, ``low, high`` (95 % interval) and ``n``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from probes import DENSE
from pruning.errors import StudyError, did_you_mean
from pruning.files import whole_file
from pruning.recipes import EVERYWHERE, UNCALIBRATED

_WORD = pa.dictionary(pa.int32(), pa.string())
_TYPES: dict[str, pa.DataType] = {
    "model": _WORD,
    "method": _WORD,
    "sparsity": pa.float64(),
    "pattern": _WORD,
    "allocation": _WORD,
    "scope": _WORD,
    "propagation": _WORD,
    "calibration": _WORD,
    "seed": pa.int32(),
    "language": _WORD,
    "layer": pa.int32(),
    "role": _WORD,
    "neuron": pa.int32(),
    "other_calibration": _WORD,
    "other_seed": pa.int32(),
    "metric": _WORD,
    "value": pa.float64(),
    "low": pa.float64(),
    "high": pa.float64(),
    "n": pa.int64(),
}
#: The columns that say which model was measured.
VARIANT_COLUMNS = (
    "model",
    "method",
    "sparsity",
    "pattern",
    "allocation",
    "scope",
    "propagation",
    "calibration",
    "seed",
)
_ESTIMATE = ("low", "high", "n")


@dataclass(frozen=True)
class Metric:
    """Unit and definition of a metric."""

    unit: str
    definition: str


@dataclass(frozen=True)
class FrameSpec:
    """One frame: its key columns beside the variant's, whether it holds estimates, and its metrics."""

    keys: tuple[str, ...]
    metrics: Mapping[str, Metric]
    estimates: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, in order."""
        return (*VARIANT_COLUMNS, *self.keys, "metric", "value", *(_ESTIMATE if self.estimates else ()))

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema."""
        return pa.schema([(name, _TYPES[name]) for name in self.columns])


_OVER = "95 % bootstrap interval over held-out segments"
FRAMES: dict[str, FrameSpec] = {
    "perplexity": FrameSpec(
        ("language",),
        {
            "perplexity": Metric(
                "", f"exp of the mean negative log-likelihood of a token, given those before it; {_OVER}"
            ),
            "bits_per_byte": Metric("bit/byte", f"the same in bits, per byte of UTF-8 text; {_OVER}"),
        },
    ),
    "signal": FrameSpec(
        ("language", "layer", "role"),
        {
            "error": Metric("", f"mean over tokens (special ones left out) of ‖x − x̂‖², x dense and x̂ pruned; {_OVER}"),
            "snr_db": Metric("dB", f"10·log10(Σ‖x‖² / Σ‖x − x̂‖²) over the same tokens; {_OVER}"),
        },
    ),
    "subspaces": FrameSpec(
        ("language", "layer"),
        {
            "specific_error": Metric(
                "",
                "Σ‖P(h − ĥ)‖² / Σ‖Ph‖²; h, ĥ: a segment's mean state, dense and pruned (special tokens left out); "
                f"P: on the language-specific subspace; {_OVER}",
            ),
            "agnostic_error": Metric("", f"the same for I − P, the language-agnostic part, mean included; {_OVER}"),
            "specific_error_centred": Metric(
                "",
                "Σ‖P(h − ĥ)‖² / Σ‖P(h − m)‖², m: the dense model's mean over languages: relative to how far languages "
                f"lie apart; {_OVER}",
            ),
            "agnostic_error_centred": Metric(
                "",
                "the same for I − P: relative to how far segments lie apart around the part common to all; " + _OVER,
            ),
            "specific_error_per_dimension": Metric("", f"mean over segments of ‖P(h − ĥ)‖² / rank P; {_OVER}"),
            "agnostic_error_per_dimension": Metric(
                "", f"mean over segments of ‖(I − P)(h − ĥ)‖² / rank (I − P); {_OVER}"
            ),
            "explained_share": Metric(
                "", "share of the fitting text's between-language variance in the subspace (dense; no language)"
            ),
        },
    ),
    "mask_overlap": FrameSpec(
        ("layer", "role", "other_calibration", "other_seed"),
        {
            "iou": Metric(
                "",
                "intersection over union of the weights kept by two variants that differ in calibration only",
            ),
            "iou_chance": Metric(
                "",
                "the same expected of independent masks of the same densities; (1 − s)/(1 + s) at sparsity s",
            ),
        },
        estimates=False,
    ),
    "neurons": FrameSpec(
        ("language", "layer", "neuron"),
        {
            "firing_probability": Metric("", "share of tokens (special ones left out) with a positive gate activation"),
            "lape": Metric(
                "nat",
                "entropy over languages of the normalised firing probabilities (no language); +inf if it never fires",
            ),
        },
        estimates=False,
    ),
    "language_neurons": FrameSpec(
        ("language", "layer"),
        {
            "kept": Metric(
                "neurons",
                "language-specific (LAPE, selected in each model afresh) in the dense and in this model",
            ),
            "lost": Metric("neurons", "language-specific in the dense model only"),
            "gained": Metric("neurons", "language-specific in this model only"),
            "still_firing": Metric(
                "neurons", "of the dense model's, those that still fire above the dense model's threshold"
            ),
        },
        estimates=False,
    ),
    "sparsity": FrameSpec(("layer", "role"), {"sparsity": Metric("", "share of weights removed")}, estimates=False),
}


def dense_columns(model: str) -> dict[str, Any]:
    """Return the variant columns of the dense model."""
    none = dict.fromkeys(("pattern", "allocation", "propagation", "calibration"), UNCALIBRATED)
    return {"model": model, "method": DENSE, "sparsity": 0.0, "scope": EVERYWHERE, **none, "seed": 0}


def tidy(name: str, rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Build a frame from rows (scalars, or arrays of one length) and check it.

    Parameters
    ----------
    name
        A key of :data:`FRAMES`.
    rows
        Mappings from column to value; columns that a row leaves out are empty in it.
    """
    spec = FRAMES[name]
    if isinstance(rows, pd.DataFrame):
        frame = rows
    else:
        parts = [pa.table(_broadcast(row, spec), schema=spec.schema) for row in rows]
        table = pa.concat_tables(parts) if parts else spec.schema.empty_table()
        frame = table.unify_dictionaries().to_pandas()
    return check(name, frame)


def check(name: str, frame: pd.DataFrame, where: str = "") -> pd.DataFrame:
    """Return `frame` if it is a frame called `name`.

    Raises
    ------
    StudyError
        If its columns or metrics are others.
    """
    if name not in FRAMES:
        raise StudyError(f'unknown frame "{name}"; {did_you_mean(name, FRAMES)}')
    spec = FRAMES[name]
    if tuple(frame.columns) != spec.columns:
        raise StudyError(f"{where}frame {name} should have the columns {', '.join(spec.columns)}")
    strange = set(frame["metric"].unique()) - set(spec.metrics)
    if strange or bool(frame[["metric", "value"]].isna().to_numpy().any()):
        raise StudyError(f"{where}frame {name} has unknown metrics {sorted(map(str, strange))} or empty values")
    return frame


def write_frame(folder: Path, name: str, frame: pd.DataFrame) -> Path:
    """Write ``NAME.parquet`` into `folder`, whole or not at all, and return its path."""
    check(name, frame)
    path = folder / f"{name}.parquet"
    table = pa.Table.from_pandas(frame, schema=FRAMES[name].schema, preserve_index=False)
    with whole_file(path) as partial:
        parquet.write_table(table, partial, compression="zstd")
    return path


def read_frame(path: Path) -> pd.DataFrame:
    """Read a frame that :func:`write_frame` wrote.

    Raises
    ------
    StudyError
        If there is none, or it is damaged or not what its name says.
    """
    if not path.is_file():
        raise StudyError(f"there is no frame {path}")
    try:
        frame = parquet.read_table(path).to_pandas()
    except (pa.ArrowInvalid, OSError) as error:
        raise StudyError(f"{path} is damaged; delete it and run again") from error
    return check(path.stem, frame, f"{path}: ")


def of_recipe(frame: pd.DataFrame, recipe: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows whose columns have the values of `recipe`."""
    keep = pd.Series(True, index=frame.index)
    for column, value in recipe.items():
        keep &= frame[column] == value
    return frame[keep]


def recipes_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """List the recipes that a frame has pruned models of, by what tells them apart; calibrated ones first."""
    columns = ["method", "sparsity", "pattern", "allocation", "scope", "propagation"]
    unique = frame[frame["method"] != DENSE][columns].drop_duplicates().sort_values(columns)
    unique = unique.sort_values("propagation", key=lambda column: column == UNCALIBRATED, kind="stable")
    return [{str(key): value for key, value in row.items()} for row in unique.to_dict("records")]


def _broadcast(row: Mapping[str, Any], spec: FrameSpec) -> list[pa.Array]:
    length = next((len(value) for value in row.values() if hasattr(value, "__len__") and not isinstance(value, str)), 1)
    arrays = []
    for field in spec.schema:
        value = row.get(field.name)
        if hasattr(value, "__len__") and not isinstance(value, str):
            array = pa.array(value, from_pandas=False)
        else:
            array = pa.repeat(pa.scalar(value, type=_plain(field.type)), length)
        arrays.append(array.dictionary_encode() if pa.types.is_dictionary(field.type) else array.cast(field.type))
    return arrays


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
