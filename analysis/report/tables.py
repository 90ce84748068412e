"""The tables of the report."""

from __future__ import annotations

from typing import Any

import pandas as pd

from probes import DENSE

from ..frames import RECIPE_COLUMNS, Frames, labels, of_recipe, recipes_of
from .facts import ReportFacts


def dense_table(frame: pd.DataFrame, facts: ReportFacts) -> list[dict[str, Any]]:
    dense = frame[frame["method"] == DENSE]
    rows = []
    for language in facts.languages:
        own = dense[dense["language"] == language].set_index("metric")
        rows.append(
            {
                "language": language,
                "perplexity": own.loc["perplexity"].to_dict(),
                "bits": own.loc["bits_per_byte"].to_dict(),
                "tokens": facts.heldout_tokens[language],
            }
        )
    return rows


def model_table(frames: Frames) -> list[dict[str, Any]]:
    """Return a row for every pruned model and language: what it lost there."""
    perplexity = frames["perplexity"]
    dense = _metric(perplexity[perplexity["method"] == DENSE], "perplexity").set_index("language")["value"]
    shown = _metric(perplexity[perplexity["method"] != DENSE], "perplexity").copy()
    if not len(shown):
        return []
    shown["variant"] = labels.variant_labels(shown)
    place = [*RECIPE_COLUMNS[1:], "calibration", "seed", "language"]
    residual = frames["signal"][(frames["signal"]["metric"] == "snr_db") & (frames["signal"]["role"] == "residual")]
    last = dict(residual[residual["layer"] == residual["layer"].max()].set_index(place)["value"])
    errors = dict(frames["subspaces"].groupby(["metric", *place], observed=True)["value"].median())
    rows = []
    for row in shown.to_dict("records"):
        key = tuple(row[name] for name in place)
        rows.append(
            {
                **row,
                "factor": row["value"] / dense[row["language"]],
                "snr": last[key],
                "specific": errors["specific_error_centred", *key],
                "agnostic": errors["agnostic_error_centred", *key],
            }
        )
    return rows


def contrast_table(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row for every comparison of two calibration sets by perplexity."""
    rows = []
    for recipe in recipes_of(frame):
        shown = of_recipe(frame, {**recipe, "metric": "log_perplexity"})
        shown = shown.assign(language=shown["language"].astype(object).where(shown["language"].notna(), "all"))
        rows += [{**row, "recipe": labels.recipe_label(recipe)} for row in shown.to_dict("records")]
    return rows


def _metric(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    return frame[frame["metric"] == metric]
