"""Building, checking and selecting from tidy frames."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import pyarrow as pa

from probes import DENSE
from pruning.errors import StudyError
from pruning.recipes import EVERYWHERE, UNCALIBRATED
from pruning.variants.size import DENSE_BITS

from .added import spec_of
from .schema import RECIPE_COLUMNS, FrameSpec

#: Values of columns of the variant that rows may leave out.
_ASSUMED = {"item_share": 0.0}


@runtime_checkable
class Frames(Protocol):
    """Frames by name, which need not be there before they are asked for."""

    def __getitem__(self, name: str, /) -> pd.DataFrame: ...


def dense_columns(model: str) -> dict[str, Any]:
    """Return the variant columns of the dense model."""
    none = dict.fromkeys(("pattern", "allocation", "propagation", "calibration"), UNCALIBRATED)
    described = {"model": model, "method": DENSE, "sparsity": 0.0, "scope": EVERYWHERE, "item_share": 0.0}
    described["bits"] = DENSE_BITS
    return {**described, **none, "seed": 0}


def tidy(name: str, rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Build a frame from rows (scalars, or arrays of one length) and check it.

    Parameters
    ----------
    name
        A key of :data:`FRAMES`, or the name of a frame that another package adds.
    rows
        Mappings from column to value; columns that a row leaves out are empty in it.
    """
    spec = spec_of(name)
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
    spec = spec_of(name)
    if tuple(frame.columns) != spec.columns:
        raise StudyError(f"{where}frame {name} should have the columns {', '.join(spec.columns)}")
    strange = set(frame["metric"].unique()) - set(spec.metrics)
    if strange or bool(frame[["metric", "value"]].isna().to_numpy().any()):
        raise StudyError(f"{where}frame {name} has unknown metrics {sorted(map(str, strange))} or empty values")
    return frame


def joined(name: str, parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of several frames of one name as one."""
    schema = spec_of(name).schema
    tables = [pa.Table.from_pandas(part, schema=schema, preserve_index=False) for part in parts]
    return check(name, pa.concat_tables(tables).unify_dictionaries().to_pandas())


def of_recipe(frame: pd.DataFrame, recipe: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows whose columns have the values of `recipe`."""
    keep = pd.Series(True, index=frame.index)
    for column, value in recipe.items():
        keep &= frame[column] == value
    return frame[keep]


def alike(columns: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Group calibrated variants, named with the columns that describe them, that differ in calibration only."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, described in columns.items():
        if described["calibration"] != UNCALIBRATED:
            groups.setdefault(tuple(described[column] for column in RECIPE_COLUMNS), []).append(name)
    return list(groups.values())


def recipes_of(frame: pd.DataFrame, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """List the recipes that a frame has pruned models of, by what tells them apart; calibrated ones first.

    Parameters
    ----------
    frame
        The frame.
    without
        Columns in which recipes may differ and count as one: those that differ in ``sparsity`` alone are a series.
    """
    columns = [column for column in RECIPE_COLUMNS[1:] if column not in without]
    unique = frame[frame["method"] != DENSE][columns].drop_duplicates().sort_values(columns)
    unique = unique.sort_values("propagation", key=lambda column: column == UNCALIBRATED, kind="stable")
    return [{str(key): value for key, value in row.items()} for row in unique.to_dict("records")]


def series_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """List the series of a frame: recipes that differ in nothing but sparsity are one."""
    return recipes_of(frame, without=("sparsity",))


def _broadcast(row: Mapping[str, Any], spec: FrameSpec) -> list[pa.Array]:
    length = next((len(value) for value in row.values() if hasattr(value, "__len__") and not isinstance(value, str)), 1)
    arrays = []
    for field in spec.schema:
        value = row.get(field.name, _ASSUMED.get(field.name))
        if hasattr(value, "__len__") and not isinstance(value, str):
            array = pa.array(value, from_pandas=False).cast(_plain(field.type))
        else:
            array = pa.repeat(pa.scalar(value, type=_plain(field.type)), length)
        arrays.append(array.dictionary_encode() if pa.types.is_dictionary(field.type) else array)
    return arrays


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
