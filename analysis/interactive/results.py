"""Frames, figures, variants and diagnoses of a dense model and its variants, addressed by what they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from html import escape
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE
from pruning import Variant
from pruning.errors import StudyError, did_you_mean, unknown
from pruning.text.languages import language_tag

from ..frames import VARIANT_COLUMNS, Frames
from ..frames.added import spec_of
from ..report import KINDS, ReportFacts, ReportFigure, figures_of_kind, study_figures, study_findings
from ..study.analyses import frame_names
from .diagnoses import Diagnosed, Diagnoses
from .selection import OF_FIGURES, OF_VARIANTS, check_known, matches, of_variant, options, rows, the_one
from .shown import Figures, Findings, Variants, html_table


class Results(ABC):
    """What is known of a dense model and its variants.

    Every frame is an attribute, too: ``results.perplexity``. Frames are made or read when they are first asked for.
    """

    #: What is said of a variant, language or frame that is not there.
    title: str

    # -- what the two kinds of results have in different places ------------------------------------------------------

    @property
    @abstractmethod
    def languages(self) -> tuple[str, ...]:
        """The evaluation languages."""

    @property
    @abstractmethod
    def frames(self) -> Frames:
        """Every frame, by name."""

    @property
    @abstractmethod
    def facts(self) -> ReportFacts:
        """What the report says beside the frames."""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, Mapping[str, Any]]:
        """The columns that describe each model in frames, by id; the dense model comes first."""

    @property
    @abstractmethod
    def diagnoses(self) -> Diagnoses:
        """Every diagnosis."""

    @property
    @abstractmethod
    def _variants(self) -> Mapping[str, Variant]:
        """Every variant, by id."""

    # -- models ------------------------------------------------------------------------------------------------------

    @property
    def models(self) -> pd.DataFrame:
        """The dense model and its variants: what each of them is, by id."""
        return pd.DataFrame.from_dict(dict(self.columns), orient="index")[list(VARIANT_COLUMNS)].rename_axis("id")

    def variants(self, **what: Any) -> Variants:
        """Return the variants that have some values.

        Parameters
        ----------
        **what
            Column of :attr:`models`, or ``id``, to a value, or to a list of values, any of which will do:
            ``variants(method="wanda", calibration=["en", "sw"])``. All variants without any.

        Raises
        ------
        StudyError
            If there is no such column, or no variant has a value.
        """
        return Variants(self._variants[str(one["id"])] for one in self._found(what))

    def variant(self, **what: Any) -> Variant:
        """Return the only variant that has some values.

        Parameters
        ----------
        **what
            As for :meth:`variants`.

        Raises
        ------
        StudyError
            If there is none, or there are several; the message says what tells them apart.
        """
        return self._variants[str(the_one(self._found(what), what, "variants")["id"])]

    def _found(self, what: Mapping[str, Any]) -> list[dict[str, Any]]:
        every = [of_variant(variant, what) for variant in self._variants.values()]
        check_known(what, every, "variants", OF_VARIANTS)
        return [one for one in every if matches(one, what)]

    # -- frames ------------------------------------------------------------------------------------------------------

    def frame(self, name: str, **what: Any) -> pd.DataFrame:
        """Return a frame, or those of its rows that have some values.

        Parameters
        ----------
        name
            Such as ``"perplexity"``.
        **what
            Column to a value, or to a list of values: ``frame("perplexity", language="sw", metric="perplexity")``.

        Raises
        ------
        StudyError
            If there is no such frame, column or value.
        """
        if name not in frame_names():
            raise StudyError(unknown("frame", name, frame_names()))
        return rows(self.frames[name], name, what)

    def __getattr__(self, name: str) -> pd.DataFrame:
        """Return the frame of this name."""
        if name in frame_names():
            return self.frames[name]
        raise AttributeError(
            f'{type(self).__name__} has no attribute "{name}"'
            + ("" if name.startswith("_") else f"; frames: {did_you_mean(name, frame_names())}")
        )

    def __dir__(self) -> Iterable[str]:
        """List the attributes, frames among them."""
        return [*super().__dir__(), *frame_names()]

    # -- figures -----------------------------------------------------------------------------------------------------

    @cached_property
    def figures(self) -> Figures:
        """Every figure of the report; all frames are needed to know which there are."""
        shown = [*study_figures(self.frames, self.facts)]
        return Figures([*shown, *(figure for one in self.diagnoses for figure in one.figures.values())])

    def figure(
        self, name: str, *, language: str | Sequence[str] | None = None, width: float | None = None, **what: Any
    ) -> Figure:
        """Draw a figure: an ordinary matplotlib figure, to show, change or save.

        Parameters
        ----------
        name
            Its kind, such as ``"signal"``, or its name in the report, such as ``"signal-wanda-0.5-row-pruned"``.
        language
            Show only these evaluation languages.
        width
            In inches, such as :data:`analysis.plots.COLUMN_WIDTH`; a page by default.
        **what
            Which recipe, and which task, if there are several: ``figure("signal", method="wanda")``.

        Raises
        ------
        StudyError
            If there is no such figure, or there are several; the message says which there are.
        """
        frames = self.frames if language is None else _OfLanguages(self.frames, self._languages(language))
        figure = self._figure(frames, name, what)
        return figure.draw(**({} if width is None else {"width": width}))

    def _figure(self, frames: Frames, name: str, what: Mapping[str, Any]) -> ReportFigure:
        kinds = [kind for kind in KINDS if name == kind or name.startswith(f"{kind}-")]
        if not kinds:
            raise StudyError(unknown("figure", name, KINDS))
        there = [figure for kind in kinds for figure in figures_of_kind(frames, self.facts, kind)]
        there = [figure for figure in there if name in (figure.kind, figure.name)]
        if not there:
            raise StudyError(f'there is nothing to draw for the figure "{name}" in {self.title}')
        described = [{"id": figure.name, **figure.what} for figure in there]
        if what and described == [{"id": name}]:
            raise StudyError(f'the figure "{name}" shows all models; leave out {", ".join(what)}')
        check_known(what, described, f'figures "{name}"', OF_FIGURES)
        chosen = the_one([one for one in described if matches(one, what)], what, f'figures "{name}"')
        return next(figure for figure in there if figure.name == chosen["id"])

    def _languages(self, wanted: str | Sequence[str]) -> list[str]:
        tags = [language_tag(tag) for tag in options(wanted)]
        for tag in tags:
            if tag not in self.languages:
                raise StudyError(f"{unknown('language', tag, self.languages)}")
        return tags

    # -- words -------------------------------------------------------------------------------------------------------

    @property
    def findings(self) -> Findings:
        """What the frames say, in sentences; all frames are needed for that."""
        said = {one.request.title: one.findings for one in self.diagnoses}
        return Findings({**said, **dict(study_findings(self.frames))})

    def diagnosis(self, **what: Any) -> Diagnosed:
        """Return the only diagnosis that has some values.

        Parameters
        ----------
        **what
            ``variant``, ``language``, ``category``, ``half`` or ``positions`` to a value, or to a list of values.

        Raises
        ------
        StudyError
            If there is none, or there are several.
        """
        columns = ("variant", "language", "category", "half", "positions")
        every = [{"id": one.request.name, **one.request.model_dump(include={*columns})} for one in self.diagnoses]
        check_known(what, every, "diagnoses", columns)
        chosen = the_one([one for one in every if matches(one, what)], what, "diagnoses")
        return next(one for one in self.diagnoses if one.request.name == chosen["id"])

    def __repr__(self) -> str:
        """Return what there is, in a line."""
        number = len(self._variants)
        return f"{self.title}: {number} variant{'s' * (number != 1)} in {', '.join(self.languages)}"

    def _repr_html_(self) -> str:
        frames = [(name, "; ".join(spec_of(name).metrics)) for name in frame_names()]
        return (
            f"<h4>{escape(repr(self))}</h4>{Variants(self._variants.values())._repr_html_()}"
            f"<details><summary>{len(frame_names())} frames, such as <code>.perplexity</code> or "
            f'<code>.frame("perplexity", language="{escape(self.languages[0])}")</code></summary>'
            f"{html_table(('frame', 'metrics'), frames)}</details>"
            f'<details><summary>figures, such as <code>.figure("signal", method="…")</code></summary>'
            f"<p>{escape(', '.join(KINDS))}</p></details>"
        )


class _OfLanguages:
    """Frames, of which only rows of some evaluation languages, and of none, are shown."""

    def __init__(self, frames: Frames, languages: Sequence[str]) -> None:
        self._frames = frames
        self._languages = languages

    def __getitem__(self, name: str) -> pd.DataFrame:
        frame = self._frames[name]
        if "language" not in frame.columns:
            return frame
        return frame[frame["language"].isin(self._languages) | frame["language"].isna()]


def dense_first(dense: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the columns of all models, those of the dense one first."""
    return {DENSE: dense, **variants}
