"""The report: every figure with its caption, what the frames say in sentences, and the page."""

from __future__ import annotations

from .catalogue import ReportFacts, ReportFigure, diagnosis_figures, study_figures
from .findings import study_findings
from .page import write_report
from .recovery import diagnosis_findings

__all__ = [
    "ReportFacts",
    "ReportFigure",
    "diagnosis_figures",
    "diagnosis_findings",
    "study_figures",
    "study_findings",
    "write_report",
]
