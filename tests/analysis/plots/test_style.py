"""One order, one name and one style of calibration sets in all figures."""

from __future__ import annotations

import math

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


def test_the_stacks_of_an_encoder_decoder_are_drawn_apart():
    line = charts.Line("a", [0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0], style.BLACK, low=[0.0] * 4, high=[5.0] * 4)
    parted = charts.broken(line, 2)
    assert list(parted.x) == [0, 1, 1.5, 2, 3]
    for values in (parted.y, parted.low, parted.high):
        assert [math.isnan(value) for value in values] == [False, False, True, False, False]
    assert charts.broken(line, 0) == charts.broken(line, 4) == line
    panels = [charts.Panel("by layer", [line]), charts.Panel("by rank", [line], x_label="rank")]
    figure = charts.line_panels(panels, title="t", x_label="layer", y_label="y", encoder=2, share=False)
    by_layer, by_rank = figure.axes
    assert by_layer.get_xlabel() == "layer (encoder: 0-1, decoder: from 2)"
    assert [drawn.get_xdata()[0] for drawn in by_layer.lines] == [1.5, 0]
    assert [list(drawn.get_xdata()) for drawn in by_rank.lines] == [[0, 1, 2, 3]]


def test_an_encoder_ends_where_cross_attention_begins():
    frame = pd.DataFrame({"layer": [0, 1, 2, 2, 3], "role": ["q", "q", "q", "cross_k", "cross_q"]})
    assert labels.encoder_blocks(frame) == 2
    assert labels.encoder_blocks(frame[frame["role"] == "q"]) == 0


def test_all_text_grows_with_the_labels_and_so_does_the_height():
    def drawn():
        panel = charts.Panel("a panel", [charts.Line("a line", [0, 1], [0.0, 1.0], style.BLACK)])
        figure = charts.line_panels([panel], title="a title", x_label="x", y_label="y", width=style.COLUMN_WIDTH)
        (axes,) = figure.axes
        texts = (axes.title, axes.xaxis.label, figure._supylabel, figure._suptitle, *figure.legends[0].get_texts())
        return [text.get_fontsize() for text in texts], figure.get_size_inches()

    plain, size = drawn()
    with style.font_size(14):
        large, larger = drawn()
    assert large == [2 * points for points in plain]
    assert list(larger) == [size[0], 2 * size[1]]
    assert drawn()[0] == plain
    assert style.points(7) == 7


def test_titles_of_panels_are_broken_where_they_would_run_into_each_other():
    title = "mean over layers and roles; diagonal: two draws of the set"
    assert style.panel_title(title, 4) == title
    assert max(map(len, style.panel_title(title, 2).splitlines())) <= 36
    with style.font_size(14):
        assert max(map(len, style.panel_title(title, 2).splitlines())) <= 18
