from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.frames import FRAMES, dense_columns, read_frame, tidy, write_frame
from pruning.errors import StudyError

ROW = {
    **dense_columns("m"),
    "language": "en",
    "metric": ["perplexity", "bits_per_byte"],
    "value": np.array([3.0, 1.0]),
}


def test_arrays_become_rows_and_missing_estimates_stay_empty():
    frame = tidy("perplexity", [ROW, ROW | {"language": "sw"}])
    assert list(frame.columns) == list(FRAMES["perplexity"].columns)
    assert frame["language"].tolist() == ["en", "en", "sw", "sw"]
    assert frame["low"].isna().all()


def test_written_frames_come_back_the_same_and_write_the_same_bytes(tmp_path):
    frame = tidy("perplexity", [ROW])
    path = write_frame(tmp_path, "perplexity", frame)
    pd.testing.assert_frame_equal(read_frame(path), frame)
    first = path.read_bytes()
    write_frame(tmp_path, "perplexity", read_frame(path))
    assert path.read_bytes() == first


def test_frames_of_earlier_versions_gain_the_size_of_their_models(tmp_path):
    described = dense_columns("m")
    models = [
        {},
        {"method": "wanda", "sparsity": 0.25, "pattern": "row"},
        {"method": "wanda", "sparsity": 0.5, "pattern": "2:4"},
    ]
    frame = tidy(
        "perplexity", [described | own | {"language": "en", "metric": "perplexity", "value": 1.0} for own in models]
    )
    path = tmp_path / "perplexity.parquet"
    frame.drop(columns=["bits", "item_share"]).to_parquet(path)
    read = read_frame(path)
    assert read["bits"].tolist() == pytest.approx([16, 13, 8 + np.log2(6) / 4])
    assert read["item_share"].tolist() == [0, 0, 0]


def test_unknown_metrics_and_columns_are_refused():
    with pytest.raises(StudyError, match="unknown metrics"):
        tidy("perplexity", [ROW | {"metric": ["perplexity", "surprise"]}])
    with pytest.raises(StudyError, match="should have the columns"):
        tidy("perplexity", pd.DataFrame({"value": [1.0]}))


def test_damaged_and_missing_frames_are_refused(tmp_path):
    path = write_frame(tmp_path, "perplexity", tidy("perplexity", [ROW]))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StudyError, match="damaged"):
        read_frame(path)
    with pytest.raises(StudyError, match="there is no frame"):
        read_frame(tmp_path / "signal.parquet")


def test_every_metric_is_defined():
    for spec in FRAMES.values():
        assert all(metric.definition for metric in spec.metrics.values())
