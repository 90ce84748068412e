"""How results show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, overload

import pandas as pd

from pruning import Variant

from ..report import ReportFigure
from .selection import of_variant


class Variants(Sequence[Variant]):
    """Some variants, in order; shows itself as a table.

    Parameters
    ----------
    variants
        The variants.
    """

    def __init__(self, variants: Iterable[Variant]) -> None:
        self._variants = tuple(variants)

    @overload
    def __getitem__(self, place: int) -> Variant: ...
    @overload
    def __getitem__(self, place: slice) -> Variants: ...
    def __getitem__(self, place: int | slice) -> Variant | Variants:
        """Return one variant, or some of them."""
        return Variants(self._variants[place]) if isinstance(place, slice) else self._variants[place]

    def __len__(self) -> int:
        """Return the number of variants."""
        return len(self._variants)

    @property
    def table(self) -> pd.DataFrame:
        """What each of them is, by id."""
        columns = [of_variant(variant) for variant in self]
        return pd.DataFrame(columns).set_index("id") if columns else pd.DataFrame()

    def __repr__(self) -> str:
        """Return their ids."""
        return f"{len(self)} variants: {', '.join(variant.id for variant in self)}" if self else "no variants"

    def _repr_html_(self) -> str:
        shown = self.table
        varied = [c for c in shown if c != "bits" and (c in ("method", "calibration") or shown[c].nunique() > 1)]
        return shown[varied].to_html(border=0) if self else "<p>no variants</p>"


class Figures(Mapping[str, ReportFigure]):
    """Figures by name; shows itself as a list with captions.

    Parameters
    ----------
    figures
        The figures, in order.
    """

    def __init__(self, figures: Iterable[ReportFigure]) -> None:
        self._figures = {figure.name: figure for figure in figures}

    def __getitem__(self, name: str) -> ReportFigure:
        """Return one figure: caption, and ``draw()``, which makes a matplotlib figure."""
        return self._figures[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._figures)

    def __len__(self) -> int:
        """Return the number of figures."""
        return len(self._figures)

    def __repr__(self) -> str:
        """Return their names."""
        return f"{len(self)} figures: {', '.join(self)}"

    def _repr_html_(self) -> str:
        cells = [(figure.section, name, figure.caption) for name, figure in self.items()]
        return html_table(("section", "name", "caption"), cells)


class Findings(Mapping[str, Sequence[str]]):
    """What the frames say, in sentences, by heading.

    Parameters
    ----------
    found
        Heading to sentences.
    """

    def __init__(self, found: Mapping[str, Sequence[str]]) -> None:
        self._found = dict(found)

    def __getitem__(self, heading: str) -> Sequence[str]:
        """Return the sentences under one heading."""
        return self._found[heading]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the headings."""
        return iter(self._found)

    def __len__(self) -> int:
        """Return the number of headings."""
        return len(self._found)

    def __repr__(self) -> str:
        """Return all sentences."""
        return "\n\n".join("\n".join([heading, *(f"- {one}" for one in said)]) for heading, said in self.items())

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{escape(heading)}</h4>{html_list(said)}" for heading, said in self.items())


def html_list(sentences: Iterable[str]) -> str:
    """Return sentences as an HTML list."""
    return f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in sentences)}</ul>"


def html_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in HTML, everything in it escaped."""
    cell = '<td style="text-align: left">{}</td>'
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    lines = ("".join(cell.format(escape(str(one))) for one in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
