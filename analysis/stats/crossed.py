"""Contrasts of models that were made from several draws of their text, on segments that all of them read.

Draws are nested in sets and crossed with segments (Judd, Westfall & Kenny, JPSP 2012): another draw of the calibration
text would have changed a score, and so would other segments. Both are counted, and t quantiles account for how few
draws there are. A bootstrap over segments alone covers about half of what it claims to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t

#: Draws of each set from which its own variance is used; with fewer, the variance is pooled over all sets.
OWN_VARIANCE = 3


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
        return Contrast(*(float(of) for of in _t_test(self.value, error, self.df)))


class Contrasts(NamedTuple):
    """Those of many studies; attributes as of :class:`Contrast`, arrays."""

    value: Float[np.ndarray, "*studies"]
    low: Float[np.ndarray, "*studies"]
    high: Float[np.ndarray, "*studies"]
    p_value: Float[np.ndarray, "*studies"]
    df: Float[np.ndarray, "*studies"]


def crossed_contrast(
    scores: Sequence[Sequence[Float[np.ndarray, "_ _"]]],
    set_weights: Float[np.ndarray, " sets"],
    language_weights: Float[np.ndarray, "*sets languages"],
    ids: Sequence[Sequence[str]] | None = None,
) -> Contrast:
    """Estimate ``Σ u_i v_il mean(scores[i][l])``, with an interval that holds over draws and segments together.

    Parameters
    ----------
    scores
        By set and language, ``[draws, segments]``. All sets have read the same segments of a language; sets may differ
        in their draws, and languages in their segments.
    set_weights, language_weights
        ``u`` and ``v``: to compare two sets in one language, 1 and -1 for the sets and 1 for the language. The weights
        of the languages are the same for all sets, or one row a set.
    ids
        Of the segments of each language: those with one id are translations of each other, and vary together. Without
        ids, languages are taken to be independent.

    Notes
    -----
    The variance is that of draws, plus that of segments, less the residual that both contain, and never below that of
    draws. A set's own variance between draws is used where every set in the contrast has three draws or more; with
    fewer it is pooled over all sets, which assumes that they vary alike.
    """
    return Contrast(*(float(of) for of in crossed_contrasts(scores, set_weights, language_weights, ids)))


def crossed_contrasts(
    scores: Sequence[Sequence[Float[np.ndarray, ...]]],
    set_weights: Float[np.ndarray, " sets"],
    language_weights: Float[np.ndarray, "*sets languages"],
    ids: Sequence[Sequence[str]] | None = None,
) -> Contrasts:
    """Estimate one contrast in many studies at once, as :func:`crossed_contrast` does in one.

    Parameters
    ----------
    scores
        By set and language, ``[studies, draws, segments]``.
    set_weights, language_weights, ids
        As there.
    """
    languages_of = np.broadcast_to(language_weights, (len(scores), np.shape(language_weights)[-1]))
    weights = np.asarray(set_weights)[:, None] * languages_of
    sets, languages = (np.flatnonzero(used).tolist() for used in (set_weights, np.any(weights, axis=0)))
    value = np.asarray(sum(weights[i, k] * scores[i][k].mean(axis=(-2, -1)) for i in sets for k in languages))
    draws = _Term.of_draws(scores, np.asarray(set_weights), languages_of)
    if draws is None:
        return Contrasts(value, *(np.full(value.shape, np.nan) for _ in range(4)))
    added, twice = list(draws), []
    for together in _translated(languages, ids):
        weighted = [_summed([(weights[i, k], scores[i][k], own) for k, own in together]) for i in sets]
        added += _Term.of_segments(weighted)
        twice += _Term.of_residuals(weighted)
    least = sum(term.variance for term in draws)
    variance = sum(term.variance for term in added) - sum(term.variance for term in twice)
    floored = variance < least
    variance = np.where(floored, least, variance)
    spread = np.where(
        floored,
        sum(term.variance**2 / term.df for term in draws),
        sum(term.variance**2 / term.df for term in [*added, *twice]),
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.where(spread > 0, variance**2 / spread, np.inf)
    return Contrasts(*_t_test(value, np.sqrt(variance), df))


def _translated(
    languages: Sequence[int], ids: Sequence[Sequence[str]] | None
) -> list[list[tuple[int, np.ndarray | None]]]:
    """Return groups of languages that share segments, directly or through others, each with its segments' numbers.

    The segments of a group are numbered through; there are no numbers where a language has none of another's segments.
    """
    if ids is None:
        return [[(k, None)] for k in languages]
    own = {k: set(ids[k]) for k in languages}
    groups: list[list[int]] = []
    for k in languages:
        shares = [group for group in groups if any(not own[k].isdisjoint(own[other]) for other in group)]
        groups = [group for group in groups if group not in shares] + [[*(j for group in shares for j in group), k]]
    found: list[list[tuple[int, np.ndarray | None]]] = []
    for group in groups:
        names = dict.fromkeys(name for k in group for name in ids[k])
        number = {name: i for i, name in enumerate(names)}
        alone = len(group) == 1
        found.append([(k, None if alone else np.array([number[name] for name in ids[k]])) for k in group])
    return found


def _summed(weighted: Sequence[tuple[float, np.ndarray, np.ndarray | None]]) -> np.ndarray:
    """Return what each segment adds to a weighted sum of means over some languages, ``[..., draws, segments]``.

    Its mean over segments is the weighted sum of means. A segment that a language lacks counts as the language's mean,
    and the deviations of the others are scaled so that the variance of this mean is what the language's own segments
    say: s² / n for a language with n of them, however many the others have.
    """
    weight, of, number = weighted[0]
    if number is None:
        return weight * of
    size = 1 + max(int(places.max()) for _, _, places in weighted if places is not None)
    total = np.zeros((*of.shape[:-1], size))
    for weight, of, places in weighted:
        assert places is not None  # several languages
        n = of.shape[-1]
        scale = np.sqrt(size * (size - 1) / (n * max(n - 1, 1)))  # 1 if no segment is lacking
        means = of.mean(axis=-1, keepdims=True)
        total += weight * means
        deviations = np.moveaxis(weight * scale * (of - means), -1, 0)
        np.add.at(np.moveaxis(total, -1, 0), places, deviations)  # an id may occur twice
    return total


def _t_test(value: Any, error: Any, df: Any) -> tuple[Any, ...]:
    """Return estimates with interval, two-sided p-value and degrees of freedom.

    With an error of 0 an estimate is certain; if the error is not known (nan), neither are interval and p-value.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.where(np.equal(error, 0), 0.0, t.ppf(0.975, df) * error)
        p_value = np.where(np.equal(error, 0), np.equal(value, 0), 2 * t.sf(np.abs(value) / error, df))
    return value, value - margin, value + margin, p_value, df


class _Term(NamedTuple):
    """A mean square as part of a variance, of every study, and its degrees of freedom."""

    variance: np.ndarray
    df: int

    @classmethod
    def of_draws(
        cls, scores: Sequence[Sequence[np.ndarray]], set_weights: np.ndarray, language_weights: np.ndarray
    ) -> list[_Term] | None:
        """What another draw changes, in all languages together; ``None`` if no set was drawn twice."""
        drawn = [
            np.asarray(sum(w * of.mean(axis=-1) for w, of in zip(*own, strict=True)))
            for own in zip(language_weights, scores, strict=True)
        ]
        number = [of.shape[-1] for of in drawn]
        sets = np.flatnonzero(set_weights).tolist()
        if all(number[i] >= OWN_VARIANCE for i in sets):
            return [cls(set_weights[i] ** 2 * drawn[i].var(axis=-1, ddof=1) / number[i], number[i] - 1) for i in sets]
        repeated = [draws for draws in drawn if draws.shape[-1] > 1]
        df = sum(draws.shape[-1] - 1 for draws in repeated)
        if not df:
            return None
        pooled = sum(((draws - draws.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1) for draws in repeated) / df
        return [cls(pooled * sum(float(set_weights[i] ** 2) / number[i] for i in sets), df)]

    @classmethod
    def of_segments(cls, weighted: Sequence[np.ndarray]) -> list[_Term]:
        """What other segments change, given what each adds to the contrast, by set ``[..., draws, segments]``."""
        differences = np.asarray(sum(of.mean(axis=-2) for of in weighted))
        segments = differences.shape[-1]
        return [cls(differences.var(axis=-1, ddof=1) / segments, segments - 1)] if segments > 1 else []

    @classmethod
    def of_residuals(cls, weighted: Sequence[np.ndarray]) -> list[_Term]:
        """What is neither of draws nor of segments, and is contained in both."""
        terms = []
        for of in weighted:
            draws, segments = of.shape[-2:]
            df = (draws - 1) * (segments - 1)
            if df:
                means = of.mean(axis=-2, keepdims=True) + of.mean(axis=-1, keepdims=True)
                rest = of - means + of.mean(axis=(-2, -1), keepdims=True)
                terms.append(cls((rest**2).sum(axis=(-2, -1)) / df / (draws * segments), df))
        return terms
