"""One order, one name and one style of calibration sets in all figures."""

from __future__ import annotations

import pandas as pd

from analysis.frames import labels
from analysis.plots import charts, style

SETS = [("none", 0), ("no", 0), ("sw", 0), ("sw", 2), ("sw", 10), ("zh-Hans", 0), ("en+sw", 0), ("all", 0), ("all", 1)]
LABELS = ["no text", "no", "sw", "sw (seed 2)", "sw (seed 10)", "zh-Hans", "en+sw", "all", "all (seed 1)"]


def rows(sets: list[tuple[str, int]]) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "calibration": [calibration for calibration, _ in sets],
            "seed": [seed for _, seed in sets],
            "language": "sw",
            "layer": 0,
            "value": range(len(sets)),
        }
    )
    return frame.astype({"calibration": "category", "language": "category"})


def test_sets_are_in_one_order_in_lines_and_tables():
    shuffled = rows(SETS[::-2] + SETS[-2::-2])
    assert labels.sets_of(shuffled) == SETS
    assert [line.label for line in charts.set_lines(shuffled)] == LABELS
    assert charts.by_calibration(shuffled).index.tolist() == LABELS


def test_a_set_has_one_colour_whatever_else_is_shown():
    together = {line.label: line.colour for line in charts.set_lines(rows(SETS))}
    for i, label in enumerate(LABELS):
        (alone,) = charts.set_lines(rows(SETS[i : i + 1]))
        assert (alone.label, alone.colour) == (label, together[label])
    assert together["no text"] == style.GREY
    assert together["sw"] == together["sw (seed 10)"] == style.colour("sw")


def test_further_seeds_are_dotted():
    assert [line.style for line in charts.set_lines(rows([("sw", 0), ("sw", 3)]))] == ["-", ":"]


def test_languages_of_the_bundled_corpus_differ_in_colour():
    known = [style.colour(tag) for tag in ("ar", "de", "en", "es", "fr", "ru", "sw", "zh", "all")]
    assert len(set(known)) == len(known)
