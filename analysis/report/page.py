"""One self-contained page: what was found in plain words, then every figure with what it measures, then tables."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pruning.files import write_text
from pruning.text.languages import language_name

from ..frames import FRAMES, Frames, labels
from .catalogue import ReportFigure
from .cells import ReportTable
from .facts import ReportFacts
from .findings import study_findings
from .tables import contrast_table, dense_table, model_table


def write_report(
    path: Path,
    frames: Frames,
    shown: Sequence[ReportFigure],
    figure_folder: Path,
    facts: ReportFacts,
    tables: Sequence[ReportTable],
    diagnoses: Mapping[str, Sequence[str]] | None = None,
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
        Heading to what each diagnosis found, in words.
    """
    environment = Environment(
        loader=PackageLoader("analysis.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"digits": labels.three_digits, "factor": labels.short}

    def image(name: str) -> str:
        return base64.b64encode((figure_folder / f"{name}.png").read_bytes()).decode()

    html = environment.get_template("report.html.j2").render(
        facts=facts,
        findings=[*(diagnoses or {}).items(), *study_findings(frames)],
        dense=dense_table(frames["perplexity"], facts),
        models=model_table(frames),
        contrasts=contrast_table(frames["contrasts"]),
        sections=[(section, list(group)) for section, group in groupby(shown, key=lambda figure: figure.section)],
        tables=[(section, list(group)) for section, group in groupby(tables, key=lambda table: table.section)],
        image=image,
        specs=FRAMES,
        language_name=language_name,
    )
    write_text(path, html)
