"""LAPE: language-specific neurons by the entropy of their firing (Tang et al., ACL 2024, 2402.16438)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from probes import DENSE, Readings

from . import figures
from .frames import of_recipe, tidy

Probabilities = Float[np.ndarray, "layers neurons languages"]

#: A neuron counts for a language if it fires more often than this share of all neurons do in all languages.
THRESHOLD_QUANTILE = 0.95
#: Share of all neurons that are selected.
SELECTED_SHARE = 0.01


@dataclass(frozen=True)
class Selection:
    """Language-specific neurons of one model.

    Attributes
    ----------
    members
        Whether a neuron is specific to a language, ``[layers, neurons, languages]``.
    threshold
        Firing probability above which a neuron counts for a language.
    """

    members: Bool[np.ndarray, "layers neurons languages"]
    threshold: float


def entropy(probabilities: Probabilities) -> Float[np.ndarray, "layers neurons"]:
    """Return LAPE: the entropy in nats of each neuron's firing probabilities, normalised over languages.

    A neuron that never fires has no distribution; its entropy is +inf, so that it is never taken for specific.

    Examples
    --------
    >>> entropy(np.array([[[0.3, 0.0], [0.2, 0.2], [0.0, 0.0]]])).round(3).tolist()
    [[0.0, 0.693, inf]]
    """
    ordered = np.sort(probabilities, axis=-1)  # the order of the languages cannot change a bit of the sums
    total = ordered.sum(axis=-1)
    share = ordered / np.where(total > 0, total, 1)[..., None]
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.where(total > 0, np.maximum(-(share * logs).sum(axis=-1), 0.0), np.inf)


def select(
    probabilities: Probabilities,
    *,
    threshold_quantile: float = THRESHOLD_QUANTILE,
    selected_share: float = SELECTED_SHARE,
) -> Selection:
    """Select a model's language-specific neurons by the published rule.

    The threshold is the k-th smallest of all probabilities, k = round(quantile · their number). Of all neurons,
    round(share · their number) with the lowest entropy are selected, those left out that exceed the threshold in
    no language; ties go by position. Each belongs to every language in which it exceeds the threshold.
    """
    ranked = np.partition(probabilities.ravel(), k := max(round(threshold_quantile * probabilities.size), 1) - 1)
    threshold = float(ranked[k])
    above = probabilities > threshold
    scores = np.where(above.any(axis=-1), entropy(probabilities), np.inf).ravel()
    wanted = np.argsort(scores, kind="stable")[: selection_size(scores.size, selected_share)]
    chosen = np.zeros(scores.size, dtype=bool)
    chosen[wanted[np.isfinite(scores[wanted])]] = True
    return Selection(above & chosen.reshape(above.shape[:2])[..., None], threshold)


def selection_size(neurons: int, selected_share: float = SELECTED_SHARE) -> int:
    """Return how many neurons are selected of a model with `neurons` in all.

    >>> selection_size(32 * 11008), selection_size(80 * 28672)  # LLaMA-2 7B and 70B
    (3523, 22938)
    """
    return round(selected_share * neurons)


def firing_probabilities(
    readings: Mapping[tuple[str, str], Readings], variant: str, languages: Sequence[str]
) -> Probabilities:
    """Return the share of tokens on which each neuron of one model fires, by language."""
    return np.stack(
        [readings[variant, lang].fired.numpy() / int(readings[variant, lang].tokens.sum()) for lang in languages],
        axis=-1,
    )


def analyze(
    readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frames ``neurons`` and ``language_neurons``.

    Quantiles are each model's own, so both questions are answered: does the dense set still fire in the pruned model
    (``still_firing``, at the dense model's threshold), and which neurons would be selected now (``kept, lost,
    gained``)? Both frames are empty for a mixture of experts, whose neurons are not read.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; ``"dense"`` is among the variants.
    columns
        Variant to the columns that describe it.
    """
    languages = list(dict.fromkeys(language for _, language in readings))
    if not next(iter(readings.values())).fired.numel():
        return tidy("neurons", []), tidy("language_neurons", [])
    dense = firing_probabilities(readings, DENSE, languages)
    before = select(dense)
    neurons, sets = [], []
    for variant in dict.fromkeys(variant for variant, _ in readings):
        probabilities = firing_probabilities(readings, variant, languages)
        layers, count, _ = probabilities.shape
        place = {
            "layer": np.repeat(np.arange(layers), count),
            "neuron": np.tile(np.arange(count), layers),
        }
        for i, language in enumerate(languages):
            values = probabilities[..., i].ravel()
            metric = ["firing_probability"] * values.size
            neurons.append({**columns[variant], **place, "language": language, "metric": metric, "value": values})
        values = entropy(probabilities).ravel()
        neurons.append({**columns[variant], **place, "metric": ["lape"] * values.size, "value": values})

        after = before if variant == DENSE else select(probabilities)
        counts = {
            "kept": before.members & after.members,
            "lost": before.members & ~after.members,
            "gained": after.members & ~before.members,
            "still_firing": before.members & (probabilities > before.threshold),
        }
        for metric_name, members in counts.items():
            for i, language in enumerate(languages):
                values = members[..., i].sum(axis=1).astype(np.float64)
                row = {**columns[variant], "language": language, "layer": np.arange(layers)}
                sets.append({**row, "metric": [metric_name] * layers, "value": values})
    return tidy("neurons", neurons), tidy("language_neurons", sets)


def plot(frame: pd.DataFrame, recipe: Mapping[str, Any]) -> Figure:
    """Draw where the dense model's language neurons are, and how many of them each calibration set keeps.

    Parameters
    ----------
    frame
        ``language_neurons``.
    recipe
        Which variants to show.
    """
    kept = frame[frame["metric"] == "kept"]
    dense = kept[kept["method"] == DENSE]
    where = dense.pivot_table(index="language", columns="layer", values="value", sort=False, observed=True)
    total = dense.groupby("language", observed=True)["value"].sum()
    pruned = of_recipe(kept, recipe).copy()
    pruned["set"] = [figures.set_label(c, s) for c, s in zip(pruned["calibration"], pruned["seed"], strict=True)]
    share = pruned.groupby(["set", "language"], observed=True, sort=False)["value"].sum().unstack() / total
    languages = figures.in_order(where.index)
    return figures.neurons(
        where.loc[languages],
        share[languages].loc[sorted(share.index, key=figures.calibration_rank)],
        title=f"Language-specific neurons ({figures.recipe_label(recipe)})",
    )
