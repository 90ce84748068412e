"""Diagnoses in Python: what recovers the drop of a variant, with its figures and remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from html import escape
from typing import overload

import pandas as pd
from matplotlib.figure import Figure

from pruning import Remedy
from pruning.errors import StudyError, unknown

from ..report import diagnosis_figures, diagnosis_findings
from ..study.diagnosis_request import DiagnosisRequest
from .shown import Figures, html_list, html_table


class Diagnosed:
    """The result of a diagnosis.

    Parameters
    ----------
    request
        What was diagnosed.
    read
        Returns the frame ``recovery``.
    find_remedy
        Returns the remedy, if anything was lost.

    Attributes
    ----------
    request
        What was diagnosed.
    """

    def __init__(
        self,
        request: DiagnosisRequest,
        read: Callable[[], pd.DataFrame],
        find_remedy: Callable[[], Remedy | None],
    ) -> None:
        self.request = request
        self._read = read
        self._find_remedy = find_remedy

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The frame ``recovery``."""
        return self._read()

    @cached_property
    def remedy(self) -> Remedy | None:
        """What to spare when the model is pruned again; ``None`` if nothing was lost."""
        return self._find_remedy()

    @cached_property
    def findings(self) -> list[str]:
        """What was found, in sentences."""
        return diagnosis_findings(self.frame)

    @cached_property
    def figures(self) -> Figures:
        """Its figures, by kind; none if nothing was lost."""
        request = self.request
        shown = diagnosis_figures(
            self.frame,
            section=request.title,
            name=request.name,
            variant=request.variant,
            language=request.language,
            category=request.category,
        )
        return Figures(shown)

    def figure(self, kind: str, *, width: float | None = None) -> Figure:
        """Draw a figure: ``curves``, ``positions``, ``map``, ``heads``, ``together`` or ``causes``.

        Parameters
        ----------
        kind
            Which figure.
        width
            In inches.

        Raises
        ------
        StudyError
            If there is no such figure.
        """
        there = {figure.kind.removeprefix("diagnosis-"): figure for figure in self.figures.values()}
        if kind not in there:
            nothing = "nothing was lost, so this diagnosis has no figures"
            raise StudyError(unknown("figure", kind, there) if there else nothing)
        return there[kind].draw(**({} if width is None else {"width": width}))

    def __repr__(self) -> str:
        """Return heading and findings."""
        return "\n".join([self.request.title, *(f"- {one}" for one in self.findings)])

    def _repr_html_(self) -> str:
        return f"<h4>{escape(self.request.title)}</h4>{html_list(self.findings)}"


class Diagnoses(Sequence[Diagnosed]):
    """Some diagnoses; shows itself as a table.

    Parameters
    ----------
    diagnoses
        The diagnoses.
    """

    def __init__(self, diagnoses: Iterable[Diagnosed]) -> None:
        self._diagnoses = tuple(diagnoses)

    @overload
    def __getitem__(self, place: int) -> Diagnosed: ...
    @overload
    def __getitem__(self, place: slice) -> Diagnoses: ...
    def __getitem__(self, place: int | slice) -> Diagnosed | Diagnoses:
        """Return one diagnosis, or some of them."""
        return Diagnoses(self._diagnoses[place]) if isinstance(place, slice) else self._diagnoses[place]

    def __len__(self) -> int:
        """Return the number of diagnoses."""
        return len(self._diagnoses)

    def __repr__(self) -> str:
        """Return their headings."""
        return "\n".join(one.request.title for one in self) if self else "no diagnoses"

    def _repr_html_(self) -> str:
        columns = ("variant", "language", "category", "half", "positions")
        rows = [[getattr(one.request, column) for column in columns] for one in self]
        return html_table(columns, rows) if self else "<p>no diagnoses</p>"
