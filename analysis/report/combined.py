"""One page on the same effects in several studies: sentences, a forest plot a question, and a table of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pruning.files import write_text
from pruning.text.languages import language_name

from .. import plots
from ..frames import ALL, labels, of_recipe
from ..metrics.contrasts import OTHERS, OWN, SIGNIFICANT
from .page import picture

#: pd.DataFrame of a figure; the effects that are pooled most surely are shown.
_MOST = 30


@dataclass(frozen=True)
class Question:
    """What a figure of the page asks of every study.

    Attributes
    ----------
    name
        Of the figure's file.
    title, x_label
        What it says.
    where
        Values of columns; ``None`` for an empty one.
    row
        Names the effect of a row.
    """

    name: str
    title: str
    x_label: str
    where: Mapping[str, object]
    row: Callable[[Mapping[Any, Any]], str]

    @property
    def unit(self) -> tuple[float, int, str]:
        """What values are multiplied by, how many digits they are given with, and their unit, in sentences."""
        if str(self.where["metric"]).startswith("accuracy"):
            return 100.0, 1, "points"
        return 1.0, 3, "dB" if str(self.where["metric"]).endswith("_db") else "nats"

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows that answer it."""
        empty = [column for column, value in self.where.items() if value is None]
        found = of_recipe(rows, {column: value for column, value in self.where.items() if value is not None})
        return found[found[empty].isna().all(axis=1)]


def _recipe(row: Mapping[Any, Any]) -> str:
    return labels.recipe_label(row)


def _category(row: Mapping[Any, Any]) -> str:
    return f"{row['category']} minus {row['other_category']} ({row['task']}); {labels.recipe_label(row)}"


def _against(row: Mapping[Any, Any]) -> str:
    return f"{labels.recipe_label(row)} minus {row['other_recipe']}"


def _asked(row: Mapping[Any, Any]) -> str:
    return f"{row['category']} ({row['task']}); {_against(row)}"


_OWN: dict[str, object] = {"frame": "contrasts", "calibration": OWN, "other_calibration": OTHERS, "language": None}
_BOTH: dict[str, object] = {"frame": "recipe_contrasts", "calibration": None, "language": None}
QUESTIONS = (
    Question(
        "own-language-perplexity",
        "Calibrating on the evaluated language against other languages: perplexity",
        "difference in log perplexity (nat)",
        _OWN | {"metric": "log_perplexity"},
        _recipe,
    ),
    Question(
        "own-language-parts",
        "The same: error of the language-specific part of the stream minus that of the agnostic part",
        "difference (dB)",
        _OWN | {"metric": "specific_minus_agnostic_db"},
        _recipe,
    ),
    Question(
        "own-language-answers",
        "Calibrating on the evaluated language against other languages: drop in accuracy",
        "difference between drops",
        {"frame": "task_contrasts", "metric": "accuracy_drop", "part": ALL, "calibration": OWN, "contrast": "own"},
        lambda row: f"{row['category']} ({row['task']}); {labels.recipe_label(row)}",
    ),
    Question(
        "categories",
        "Does pruning cost one category more than another?",
        "difference between drops in accuracy",
        {
            "frame": "task_contrasts",
            "metric": "accuracy_drop",
            "part": ALL,
            "contrast": "category",
            "calibration": None,
            "language": None,
        },
        _category,
    ),
    Question(
        "recipes-perplexity",
        "One recipe against another: perplexity",
        "difference in log perplexity (nat)",
        _BOTH | {"metric": "log_perplexity"},
        _against,
    ),
    Question(
        "recipes-answers",
        "One recipe against another: accuracy",
        "difference in accuracy",
        _BOTH | {"metric": "accuracy"},
        _asked,
    ),
)


@dataclass(frozen=True)
class Answer:
    """A question's figure, and what it shows in sentences."""

    question: Question
    sentences: Sequence[str]
    left_out: int
    draw: Callable[..., Figure]


def answers(rows: pd.DataFrame) -> Iterator[Answer]:
    """Yield what several studies answer, of every question of which they have effects in common.

    Parameters
    ----------
    rows
        Of :func:`analysis.metrics.combined.combine`.
    """
    for question in QUESTIONS:
        found = question.of(rows)
        if not len(found):
            continue
        names = [question.row(row) for row in found.to_dict("records")]
        together = found["study"].isna().to_numpy()
        strength = {
            name: abs(row["value"]) / max(row["high"] - row["low"], 1e-12)
            for name, row, whole in zip(names, found.to_dict("records"), together, strict=True)
            if whole
        }
        kept = set(sorted(strength, key=lambda name: -strength[name])[:_MOST])
        shown = np.array([name in kept for name in names])
        yield Answer(
            question,
            [
                sentence(row, name, question)
                for name, row in zip(names, found.to_dict("records"), strict=True)
                if name in kept and pd.isna(row["study"])
            ],
            len(strength) - len(kept),
            partial(
                plots.combined.forest,
                found[shown],
                [name for name in names if name in kept],
                title=question.title,
                x_label=question.x_label,
            ),
        )


def sentence(row: Mapping[Any, Any], name: str, question: Question) -> str:
    """Say what all studies together show of one effect."""
    scale, digits, unit = question.unit
    value, low, high = (f"{scale * row[column]:+.{digits}f}" for column in ("value", "low", "high"))
    sure = "significant" if row["p_adjusted"] < SIGNIFICANT else "not significant"
    alike = "studies differ" if row["p_alike"] < SIGNIFICANT else "studies are not shown to differ"
    return (
        f"{name}: {value} [{low}, {high}] {unit} over {row['studies']} studies ({sure}, p = {row['p_adjusted']:.2g}); "
        f"{alike} (I² {row['i_squared']:.0%}, standard deviation between them {scale * row['tau']:.{digits}f} {unit})."
    )


def write_page(
    folder: Path, rows: pd.DataFrame, described: Mapping[str, Mapping[str, str]], shown: Sequence[Answer]
) -> Path:
    """Write ``report.html``, one self-contained page, and return its path.

    Parameters
    ----------
    folder
        Where the figures are already, in ``figures``.
    rows
        Of :func:`analysis.metrics.combined.combine`.
    described
        Name of each study to what describes it.
    shown
        The answers.
    """
    environment = Environment(
        loader=PackageLoader("analysis.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    own = files("analysis.report")
    together = rows[rows["study"].isna()].astype(object).where(lambda table: table.notna(), None)
    html = environment.get_template("combined.html.j2").render(
        studies=described,
        shown=shown,
        rows=[row | {"recipe": labels.recipe_label(row)} for row in together.to_dict("records")],
        image=lambda name: picture(folder / "figures" / f"{name}.png"),
        css=Markup(own.joinpath("report.css").read_text(encoding="utf-8")),
        js=Markup(own.joinpath("report.js").read_text(encoding="utf-8")),
        language_name=language_name,
    )
    path = folder / "report.html"
    write_text(path, html)
    return path
