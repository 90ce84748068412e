"""One self-contained page: what was found in plain words, then every figure with what it measures, then tables."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pruning.files import write_text
from pruning.text.languages import language_name

from ..frames import Frames, labels
from ..frames.added import all_specs
from .catalogue import ReportFigure
from .cells import ReportTable
from .crossing import crossing_findings
from .explore import CALIBRATION, EVERYTHING, LANGUAGE, LAYER, RECIPE, ROLE, Chart, charts, columns_of, menus
from .facts import ReportFacts
from .findings import study_findings
from .maps import map_findings
from .paragraph import methods_paragraph, methods_plain
from .recovery import diagnosis_findings
from .summary import summary
from .tables import contrast_table, dense_table, model_table

#: What the page calls the columns that its menus filter by.
_MENUS = {RECIPE: "recipe", CALIBRATION: "calibration set", LANGUAGE: "language", LAYER: "block", ROLE: "role"}
_COLOURS = 256


class Picture(NamedTuple):
    """A figure inside the page: its size in pixels, and its data."""

    width: int
    height: int
    url: str


def write_report(
    path: Path,
    frames: Frames,
    shown: Sequence[ReportFigure],
    figure_folder: Path,
    facts: ReportFacts,
    tables: Sequence[ReportTable],
    diagnoses: Mapping[str, tuple[str, pd.DataFrame]] | None = None,
    across: Mapping[str, Mapping[str, pd.DataFrame]] | None = None,
    crossings: Mapping[str, pd.DataFrame] | None = None,
) -> None:
    """Write ``report.html``: no other file and no network is needed to read it.

    Parameters
    ----------
    path
        Written whole or not at all.
    frames
        Those of :data:`analysis.frames.STUDY_FRAMES`.
    shown
        The figures, drawn already.
    figure_folder
        Where their PNG files are.
    facts
        What the frames do not say.
    tables
        The tables, whose files are in a folder ``tables`` beside the page.
    diagnoses
        Heading of each diagnosis to its name and its frame ``recovery``.
    across
        Heading of diagnoses that differ in language alone to the frames by language.
    crossings
        Heading of a diagnosis to its frame ``crossing``, if it has one.
    """
    environment = Environment(
        loader=PackageLoader("analysis.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"digits": labels.three_digits, "factor": labels.short}
    diagnoses = diagnoses or {}
    said = {heading: diagnosis_findings(frame) for heading, (_, frame) in diagnoses.items()}
    for heading, frame in (crossings or {}).items():
        said[heading] += crossing_findings(frame)
    said |= {heading: found for heading, frames_ in (across or {}).items() if (found := map_findings(frames_))}
    explored = list(charts(frames, diagnoses))
    html = environment.get_template("report.html.j2").render(
        facts=facts,
        top=summary(frames, diagnoses, [figure.name for figure in shown]),
        findings=[*said.items(), *study_findings(frames)],
        charts=explored,
        menus=menus(explored),
        menu_names=_MENUS,
        everything=EVERYTHING,
        explore=_embedded(explored),
        vega=_vega() if explored else "",
        css=_part("report.css"),
        js=_part("report.js"),
        methods=methods_plain(methods_paragraph(facts, frames, bool(diagnoses))),
        dense=dense_table(frames["perplexity"], facts),
        models=model_table(frames),
        contrasts=contrast_table(frames["contrasts"]),
        sections=[(section, list(group)) for section, group in groupby(shown, key=lambda figure: figure.section)],
        tables=[(section, list(group)) for section, group in groupby(tables, key=lambda table: table.section)],
        image=lambda name: picture(figure_folder / f"{name}.png"),
        specs=all_specs(),
        language_name=language_name,
    )
    write_text(path, html)


def picture(path: Path) -> Picture:
    """Return a figure as it is embedded in the page: as WebP with at most 256 colours, about a quarter of the file."""
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    packed = io.BytesIO()
    few.convert("RGB").save(packed, format="WEBP", lossless=True)
    return Picture(*few.size, "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode())


def _embedded(shown: Sequence[Chart]) -> Markup:
    """Return specifications and data of the charts as JSON that cannot end the element that it stands in."""
    content: dict[str, Any] = {
        chart.name: {
            "spec": chart.spec,
            "columns": columns_of(chart.data),
            "filters": list(chart.filters),
            "everything": EVERYTHING,
        }
        for chart in shown
    }
    return Markup(json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


@cache
def _vega() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script, which sets the global ``vegaEmbed``."""
    return Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"))


def _part(name: str) -> Markup:
    return Markup(files("analysis.report").joinpath(name).read_text(encoding="utf-8"))
