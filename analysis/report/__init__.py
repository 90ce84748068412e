"""The report: every figure and table with its caption, what the frames say in sentences, and the page."""

from __future__ import annotations

from .catalogue import (
    KINDS,
    ReportFigure,
    crossing_figures,
    diagnosis_figures,
    figures_of_group,
    figures_of_kind,
    kinds_of_group,
    map_figures,
    study_figures,
)
from .cells import ReportTable
from .crossing import crossing_findings
from .facts import ReportFacts
from .findings import study_findings
from .latex import document, latex
from .maps import map_findings
from .page import write_report
from .paper_tables import study_tables
from .paragraph import methods_latex, methods_paragraph, references
from .recovery import diagnosis_findings

__all__ = [
    "KINDS",
    "ReportFacts",
    "ReportFigure",
    "ReportTable",
    "crossing_figures",
    "crossing_findings",
    "diagnosis_figures",
    "diagnosis_findings",
    "document",
    "figures_of_group",
    "figures_of_kind",
    "kinds_of_group",
    "latex",
    "map_figures",
    "map_findings",
    "methods_latex",
    "methods_paragraph",
    "references",
    "study_figures",
    "study_findings",
    "study_tables",
    "write_report",
]
