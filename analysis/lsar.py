"""LSAR: language-specific against language-agnostic subspaces (Xie et al., EMNLP 2022, 2401.05792)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor

from probes import DENSE, Readings

from . import figures
from .frames import of_recipe, tidy
from .intervals import segment_interval


class LSAR(TransformerMixin, BaseEstimator):
    """The subspace in which a layer's language means differ, and the projection that removes it.

    The means are centred over languages; the first `rank` left singular vectors of the thin SVD span the
    language-specific subspace. This spans the same space as the paper's two-step form.

    Parameters
    ----------
    rank
        Dimensions of the subspace; one less than there are languages by default (the centred means have no more).

    Attributes
    ----------
    basis_
        Orthonormal columns, ``[hidden, rank]``.
    mean_
        μ: the part of the mean over languages outside the subspace, common to all, ``[hidden]``.
    centre_
        The whole mean over languages, ``[hidden]``.
    explained_share_
        Share of the between-language variance inside the subspace.

    Examples
    --------
    >>> means = np.eye(3, 5)  # three languages, each with a direction of its own
    >>> lsar = LSAR().fit(means)
    >>> lsar.basis_.shape, bool(np.allclose(lsar.transform(means), means.mean(axis=0)))
    ((5, 2), True)
    """

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank

    def fit(self, X: Float[np.ndarray, "languages hidden"], y: None = None) -> LSAR:
        """Find the subspace from one mean embedding a language.

        Raises
        ------
        ValueError
            If `rank` is not between 1 and the number of languages less one.
        """
        languages = X.shape[0]
        rank = languages - 1 if self.rank is None else self.rank
        if not 1 <= rank <= languages - 1:
            raise ValueError(f"rank {rank} is not between 1 and {languages - 1}, the number of languages less one")
        means = X.astype(np.float64)
        mean = means.mean(axis=0)
        left, singular, _ = np.linalg.svd((means - mean).T, full_matrices=False)
        self.basis_ = left[:, :rank]
        self.centre_ = mean
        self.mean_ = mean - self.basis_ @ (self.basis_.T @ mean)
        variance = singular**2
        self.explained_share_ = float(variance[:rank].sum() / variance.sum()) if variance.sum() else 1.0
        return self

    def specific(self, X: Float[np.ndarray, "segments hidden"]) -> Float[np.ndarray, "segments rank"]:
        """Return the language-specific part, in coordinates of the basis (lengths are those of the full vectors)."""
        return X @ self.basis_

    def transform(self, X: Float[np.ndarray, "segments hidden"]) -> Float[np.ndarray, "segments hidden"]:
        """Return the language-agnostic part: `X` without its projection on the subspace."""
        return X - (X @ self.basis_) @ self.basis_.T


def fit_layers(pooled: Mapping[str, Tensor], rank: int | None = None) -> list[LSAR]:
    """Fit one subspace a layer on the dense model.

    Parameters
    ----------
    pooled
        Language to the mean hidden states of segments of the fitting text, ``[segments, layers, hidden]``.
    rank
        Of the subspaces.
    """
    means = np.stack([states.double().mean(dim=0).numpy() for states in pooled.values()])
    return [LSAR(rank).fit(means[:, layer]) for layer in range(means.shape[1])]


_METRICS = (
    "specific_error",
    "agnostic_error",
    "specific_error_centred",
    "agnostic_error_centred",
    "specific_error_per_dimension",
    "agnostic_error_per_dimension",
)


def analyze(
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
    subspaces: list[LSAR],
) -> pd.DataFrame:
    """Return the frame ``subspaces``: error of the specific and of the agnostic part, dense against pruned.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read of the evaluation text.
    columns
        Variant to the columns that describe it.
    subspaces
        One a layer, fitted on the dense model and on other text (:func:`fit_layers`): fitted on each model anew they
        would mix rotation with loss.
    """
    share = [subspace.explained_share_ for subspace in subspaces]
    layers = np.arange(len(subspaces))
    rows: list[dict[str, Any]] = [
        {**columns[DENSE], "layer": layers, "metric": ["explained_share"] * len(share), "value": share}
    ]
    for (variant, language), read in readings.items():
        if variant == DENSE:
            continue
        dense = readings[DENSE, language].pooled.double().numpy()
        pruned = read.pooled.double().numpy()
        # sums[metric part][segment, layer]
        parts = [_parts(s, dense[:, i], pruned[:, i]) for i, s in enumerate(subspaces)]
        sums = np.stack(parts, axis=2)  # [quantity, segments, layers]
        rank = np.array([s.basis_.shape[1] for s in subspaces])
        dimensions = np.stack([rank, dense.shape[2] - rank])

        def of(weights: np.ndarray, sums: np.ndarray = sums, dimensions: np.ndarray = dimensions) -> np.ndarray:
            total = np.moveaxis(weights @ sums, 0, -2)  # [draws, quantity, layers]
            error, power, spread = total[..., 0:2, :], total[..., 2:4, :], total[..., 4:6, :]
            each = error / dimensions / weights.sum(axis=-1)[..., None, None]
            return np.concatenate([error / power, error / spread, each], axis=-2).reshape(*weights.shape[:-1], -1)

        value, low, high = segment_interval(of, dense.shape[0])
        rows.append(
            {
                **columns[variant],
                "language": language,
                "layer": np.tile(layers, len(_METRICS)),
                "metric": np.repeat(_METRICS, len(layers)).tolist(),
                "value": value,
                "low": low,
                "high": high,
                "n": dense.shape[0],
            }
        )
    return tidy("subspaces", rows)


def _parts(
    subspace: LSAR, dense: Float[np.ndarray, "segments hidden"], pruned: Float[np.ndarray, "segments hidden"]
) -> Float[np.ndarray, "6 segments"]:
    """Return, for each segment, squared norms (specific, agnostic) of the error, of the signal and of its spread."""
    result = []
    for states in (dense - pruned, dense, dense - subspace.centre_):
        inside = (subspace.specific(states) ** 2).sum(axis=1)
        result += [inside, (subspace.transform(states) ** 2).sum(axis=1)]
    return np.stack(result)


def plot(frame: pd.DataFrame, recipe: Mapping[str, Any]) -> Figure:
    """Draw the error of both parts by layer, relative to their spread; a panel a language."""
    shown = of_recipe(frame, recipe)
    shown = shown[shown["metric"].isin(["specific_error_centred", "agnostic_error_centred"])]
    keys = ["language", "metric", "layer"]
    spread = shown.groupby(keys, observed=True, sort=False)["value"].agg(["mean", "min", "max"]).reset_index()
    spread = spread.rename(columns={"mean": "value", "min": "low", "max": "high"})
    spread["part"] = spread["metric"].map(
        {"specific_error_centred": "language-specific", "agnostic_error_centred": "language-agnostic"}
    )
    return figures.curves(
        spread,
        panels="language",
        lines="part",
        y_label="error relative to the spread",
        title=f"Error of the language-specific and -agnostic part ({figures.recipe_label(recipe)})",
        log=True,
    )
