"""Frames on disk: one Parquet file each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from probes import DENSE
from pruning.errors import StudyError
from pruning.files import whole_file
from pruning.variants.size import DENSE_BITS, pruned_bits

from .added import spec_of
from .tables import check


def write_frame(folder: Path, name: str, frame: pd.DataFrame | Iterable[pd.DataFrame]) -> Path:
    """Write ``NAME.parquet`` into `folder`, whole or not at all, and return its path.

    Parameters
    ----------
    folder, name
        Where, and a key of :data:`FRAMES`, or the name of a frame that another package adds.
    frame
        The frame, or its parts one after the other, if it would not fit into memory.
    """
    path = folder / f"{name}.parquet"
    parts = [frame] if isinstance(frame, pd.DataFrame) else frame
    schema = spec_of(name).schema
    with whole_file(path) as partial, parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
        for part in parts:
            check(name, part)
            writer.write_table(pa.Table.from_pandas(part, schema=schema, preserve_index=False))
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
    return check(path.stem, _with_share(_with_bits(frame)), f"{path}: ")


def _with_bits(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame with the column ``bits``, which those of earlier versions lack: all models were pruned."""
    if "bits" in frame or not {"method", "sparsity", "pattern", "propagation"} <= set(frame.columns):
        return frame
    bits = [
        DENSE_BITS if method == DENSE else pruned_bits(sparsity, str(pattern))
        for method, sparsity, pattern in zip(frame["method"], frame["sparsity"], frame["pattern"], strict=True)
    ]
    frame.insert(frame.columns.get_loc("propagation") + 1, "bits", bits)
    return frame


def _with_share(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame with the column ``item_share``, which earlier versions lack: they calibrated on no items."""
    if "item_share" not in frame and "propagation" in frame:
        frame.insert(frame.columns.get_loc("propagation") + 1, "item_share", 0.0)
    return frame
