"""Contrasts of models that were made from several draws of their text, on segments that all of them read.

Draws are nested in sets and crossed with segments (Judd, Westfall & Kenny, JPSP 2012): another draw of the calibration
text would have changed a score, and so would other segments. Both are counted, and t quantiles account for how few
draws there are. A bootstrap over segments alone covers about half of what it claims to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t

#: Draws of each set from which its own variance is used; with fewer, the variance is pooled over all sets.
_OWN_VARIANCE = 3


class Contrast(NamedTuple):
    """An estimate with its 95 % interval.

    Attributes
    ----------
    value, low, high
        The interval is empty (nan) if no set was drawn twice.
    p_value
        Two-sided, that the value is 0.
    df
        Degrees of freedom (Satterthwaite).
    """

    value: float
    low: float
    high: float
    p_value: float
    df: float

    def with_error(self, variance: float) -> Contrast:
        """Return the contrast with the variance of something else that it was computed from added to its own."""
        if not np.isfinite(self.df) or not variance:
            return self
        error = np.hypot((self.high - self.value) / t.ppf(0.975, self.df), np.sqrt(variance))
        return self._of(self.value, float(error), self.df)

    @classmethod
    def _of(cls, value: float, error: float, df: float) -> Contrast:
        margin = float(t.ppf(0.975, df) * error)
        return cls(value, value - margin, value + margin, float(2 * t.sf(abs(value) / error, df)), float(df))


def crossed_contrast(
    scores: Sequence[Sequence[Float[np.ndarray, "_ _"]]],
    set_weights: Float[np.ndarray, " sets"],
    language_weights: Float[np.ndarray, "*sets languages"],
) -> Contrast:
    """Estimate ``Σ u_i v_il mean(scores[i][l])``, with an interval that holds over draws and segments together.

    Parameters
    ----------
    scores
        By set and language, ``[draws, segments]``. All sets have read the same segments of a language; sets may differ
        in their draws, and languages in their segments, which are taken to be independent.
    set_weights, language_weights
        ``u`` and ``v``: to compare two sets in one language, 1 and -1 for the sets and 1 for the language. The weights
        of the languages are the same for all sets, or one row a set.

    Notes
    -----
    The variance is that of draws, plus that of segments, less the residual that both contain, and never below that of
    draws. A set's own variance between draws is used where every set in the contrast has three draws or more; with
    fewer it is pooled over all sets, which assumes that they vary alike.
    """
    languages_of = np.broadcast_to(language_weights, (len(scores), np.shape(language_weights)[-1]))
    weights = np.asarray(set_weights)[:, None] * languages_of
    sets, languages = (np.flatnonzero(used).tolist() for used in (set_weights, np.any(weights, axis=0)))
    value = float(sum(weights[i, k] * scores[i][k].mean() for i in sets for k in languages))
    draws = _Term.of_draws(scores, np.asarray(set_weights), languages_of)
    if draws is None:
        return Contrast(value, *[float("nan")] * 4)
    added, twice = list(draws), []
    for k in languages:
        in_language = [(weights[i, k], scores[i][k]) for i in sets]
        added += _Term.of_segments(in_language)
        twice += _Term.of_residuals(in_language)
    variance = sum(term.variance for term in added) - sum(term.variance for term in twice)
    least = sum(term.variance for term in draws)
    if variance < least:
        variance, added, twice = least, draws, []
    spread = sum(term.variance**2 / term.df for term in [*added, *twice])
    if not spread:
        return Contrast(value, value, value, float(value == 0), float("inf"))
    return Contrast._of(value, float(np.sqrt(variance)), variance**2 / spread)


class _Term(NamedTuple):
    """A mean square as part of a variance, and its degrees of freedom."""

    variance: float
    df: int

    @classmethod
    def of_draws(
        cls, scores: Sequence[Sequence[np.ndarray]], set_weights: np.ndarray, language_weights: np.ndarray
    ) -> list[_Term] | None:
        """What another draw changes, in all languages together; ``None`` if no set was drawn twice."""
        drawn = [
            sum(w * of.mean(axis=1) for w, of in zip(*own, strict=True))
            for own in zip(language_weights, scores, strict=True)
        ]
        sets = np.flatnonzero(set_weights).tolist()
        if all(len(drawn[i]) >= _OWN_VARIANCE for i in sets):
            return [
                cls(float(set_weights[i] ** 2 * drawn[i].var(ddof=1) / len(drawn[i])), len(drawn[i]) - 1) for i in sets
            ]
        repeated = [draws for draws in drawn if len(draws) > 1]
        df = sum(len(draws) - 1 for draws in repeated)
        if not df:
            return None
        pooled = sum(float(((draws - draws.mean()) ** 2).sum()) for draws in repeated) / df
        return [cls(pooled * sum(float(set_weights[i] ** 2) / len(drawn[i]) for i in sets), df)]

    @classmethod
    def of_segments(cls, weighted: Sequence[tuple[float, np.ndarray]]) -> list[_Term]:
        """What other segments of one language change."""
        differences = sum(weight * of.mean(axis=0) for weight, of in weighted)
        segments = len(differences)
        return [cls(float(differences.var(ddof=1)) / segments, segments - 1)] if segments > 1 else []

    @classmethod
    def of_residuals(cls, weighted: Sequence[tuple[float, np.ndarray]]) -> list[_Term]:
        """What is neither of draws nor of segments, and is contained in both."""
        terms = []
        for weight, of in weighted:
            df = (of.shape[0] - 1) * (of.shape[1] - 1)
            if df:
                rest = of - of.mean(axis=0) - of.mean(axis=1, keepdims=True) + of.mean()
                terms.append(cls(float(weight**2 * (rest**2).sum() / df / of.size), df))
        return terms
