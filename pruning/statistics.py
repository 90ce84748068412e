"""Statistics that scoring methods need of a projection, accumulated over the calibration text."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import MethodError
from .input_parts import InputPart, PartSums

#: Names of the statistics that a method can request.
SQUARES, GRAM, POSITIVE, ABSOLUTE = "squares", "gram", "positive", "absolute"
MOMENTS, SIMILARITY = "moments", "similarity"
GRADIENT, CURVATURE, SLOPES = "gradient", "curvature", "slopes"
#: Those of the inputs of a projection or a block, and the derivatives of the whole dense model's loss.
OF_INPUTS = (SQUARES, GRAM, POSITIVE, ABSOLUTE, MOMENTS, SIMILARITY)
OF_THE_LOSS = (GRADIENT, CURVATURE, SLOPES)
STATISTICS = (*OF_INPUTS, *OF_THE_LOSS)
#: Panel width for updates of a Gram matrix; only panels on and above the diagonal are computed.
_PANEL = 512


@dataclass
class LanguageSums:
    """Sums over the tokens of one language.

    Attributes
    ----------
    tokens
        Number of tokens.
    squares
        Sum of squares of every input, ``‖X_j‖₂²``; float32 ``[inputs]``.
    positive
        Number of tokens on which an input is positive, float32 ``[inputs]``; exact below 2^24 tokens.
    absolute
        Sum of the absolute values of every input, float32 ``[inputs]``.
    """

    tokens: int
    squares: Tensor
    positive: Tensor
    absolute: Tensor

    def __add__(self, other: LanguageSums) -> LanguageSums:
        """Return the sums over both sets of tokens."""
        return LanguageSums(
            self.tokens + other.tokens,
            self.squares + other.squares,
            self.positive + other.positive,
            self.absolute + other.absolute,
        )


@dataclass(frozen=True)
class Moments:
    """Mean of every input, and its squared deviations from it, which lose no digits where the mean is large.

    Attributes
    ----------
    tokens
        Number of tokens.
    mean
        Mean of every input, float32 ``[inputs]``.
    deviations
        Sum of the squared deviations from it, float32 ``[inputs]``.
    """

    tokens: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def of(cls, rows: Float[Tensor, "tokens inputs"]) -> Moments:
        """Return those of a batch."""
        variance, mean = torch.var_mean(rows, dim=0, correction=0)
        return cls(len(rows), mean, variance * len(rows))

    def __add__(self, other: Moments) -> Moments:
        """Return the moments over both sets of tokens (Chan, Golub & LeVeque, 1983)."""
        tokens = self.tokens + other.tokens
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.tokens / tokens)
        between = apart.square() * (self.tokens * other.tokens / tokens)
        return Moments(tokens, mean, self.deviations + other.deviations + between)


class InputStatistics:
    """Sums over the inputs of one projection, in float32 whatever the model's dtype.

    The statistics of two texts add up to those of both, up to rounding. Reading a statistic that was not gathered
    raises :class:`~pruning.errors.MethodError`.

    Parameters
    ----------
    inputs
        Number of input features.
    needs
        What to gather: any of ``squares``, ``positive``, ``absolute``, ``moments`` and ``gram``.
    device
        Device of the sums.
    parts
        Parts of the inputs that recipes may give less weight, by a name of their own; see :meth:`weighted`.

    Attributes
    ----------
    languages
        Language to its sums.
    memo
        A method's cache of intermediate results that later recipes can reuse.
    """

    def __init__(
        self,
        inputs: int,
        needs: frozenset[str],
        device: torch.device | str = "cpu",
        parts: Mapping[str, InputPart] | None = None,
    ) -> None:
        self.inputs = inputs
        self.needs = needs
        self.device = torch.device(device)
        self.languages: dict[str, LanguageSums] = {}
        self._moments: Moments | None = None
        self._panels: Tensor | None = None
        if GRAM in needs:
            self._panels = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self._mirrored = False  # whether the panels hold the matrix below the diagonal too
        self._parts = {name: PartSums(part) for name, part in (parts or {}).items()}
        self.memo: dict[Hashable, Any] = {}

    def add(self, x: Float[Tensor, "*tokens inputs"], language: str = "") -> None:
        """Add a batch of inputs, one row per token."""
        rows = x.reshape(-1, self.inputs).float()
        if language not in self.languages:
            zeros = torch.zeros(self.inputs, dtype=torch.float32, device=self.device)
            self.languages[language] = LanguageSums(0, zeros, zeros.clone(), zeros.clone())
        sums = self.languages[language]
        sums.tokens += len(rows)
        if SQUARES in self.needs:
            sums.squares += rows.square().sum(dim=0)
        if POSITIVE in self.needs:
            sums.positive += (rows > 0).sum(dim=0)
        if ABSOLUTE in self.needs:
            sums.absolute += rows.abs().sum(dim=0)
        if MOMENTS in self.needs and len(rows):
            moments = Moments.of(rows)
            self._moments = moments if self._moments is None else self._moments + moments
        for part in self._parts.values():
            self.memo.clear()
            part.add(rows)
        if self._panels is not None:
            self.memo.clear()
            self._mirrored = False
            for start in range(0, self.inputs, _PANEL):
                stop = start + _PANEL
                self._panels[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Return the statistics of both texts."""
        total = InputStatistics(self.inputs, self.needs - {GRAM}, self.device)
        total.needs = self.needs
        total.languages = dict(self.languages)
        for language, sums in other.languages.items():
            total.languages[language] = total.languages[language] + sums if language in total.languages else sums
        both = [part._moments for part in (self, other) if part._moments is not None]
        total._moments = reduce(operator.add, both) if both else None
        if self._panels is not None and other._panels is not None:
            total._panels = self._panels + other._panels
        total._parts = {name: sums + other._parts[name] for name, sums in self._parts.items()}
        return total

    def weighted(self, part: str, weight: float) -> InputStatistics:
        """Return sums of squares and the Gram matrix, as far as they were gathered, with a part at another weight.

        They are themselves if the inputs have no such part. Languages are not told apart any more.

        Parameters
        ----------
        part
            Its name.
        weight
            Share of it that is left, 0 to 1.
        """
        if part not in self._parts:
            return self
        key = ("weighted", part, weight)
        if key not in self.memo:
            sums = self._parts[part]
            found = InputStatistics(self.inputs, self.needs & {SQUARES}, self.device)
            found.needs = self.needs & {SQUARES, GRAM}
            zeros = torch.zeros(self.inputs, device=self.device)
            squares = sums.squares(self.squares, weight) if SQUARES in self.needs else zeros
            found.languages = {"": LanguageSums(self.tokens, squares, zeros, zeros)}
            if self._panels is not None:
                found._panels = sums.gram(self._panels, weight)
            self.memo[key] = found
        found = self.memo[key]
        assert isinstance(found, InputStatistics)
        return found

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return sum(sums.tokens for sums in self.languages.values())

    @property
    def squares(self) -> Float[Tensor, " inputs"]:
        """Sum of squares of every input over all tokens; a Gram matrix has them on its diagonal."""
        if SQUARES not in self.needs and self._panels is not None:
            return self._panels.diagonal().clone()
        self._require(SQUARES)
        return sum((s.squares for s in self.languages.values()), torch.zeros(self.inputs, device=self.device))

    @property
    def norms(self) -> Float[Tensor, " inputs"]:
        """``‖X_j‖₂`` of every input."""
        return self.squares.sqrt()

    @property
    def firing(self) -> Float[Tensor, " inputs"]:
        """Share of tokens on which each input is positive."""
        self._require(POSITIVE)
        total = sum((s.positive for s in self.languages.values()), torch.zeros(self.inputs, device=self.device))
        return total / max(self.tokens, 1)

    @property
    def mean_magnitude(self) -> Float[Tensor, " inputs"]:
        """Mean absolute value of each input over all tokens."""
        self._require(ABSOLUTE)
        total = sum((s.absolute for s in self.languages.values()), torch.zeros(self.inputs, device=self.device))
        return total / max(self.tokens, 1)

    @property
    def mean(self) -> Float[Tensor, " inputs"]:
        """Mean of every input over all tokens."""
        return self._known_moments().mean

    @property
    def variance(self) -> Float[Tensor, " inputs"]:
        """Variance of every input over all tokens (the mean squared deviation)."""
        moments = self._known_moments()
        return moments.deviations / moments.tokens

    def _known_moments(self) -> Moments:
        self._require(MOMENTS)
        zeros = torch.zeros(self.inputs, device=self.device)
        return self._moments or Moments(1, zeros, zeros)

    def norms_by_language(self) -> dict[str, Tensor]:
        """Return ``‖X_j‖₂`` for each language, rescaled as if each had the mean number of tokens."""
        self._require(SQUARES)
        mean = self.tokens / max(len(self.languages), 1)
        return {
            language: (sums.squares * (mean / max(sums.tokens, 1))).sqrt() for language, sums in self.languages.items()
        }

    @property
    def gram(self) -> Float[Tensor, "inputs inputs"]:
        """``XᵀX``."""
        upper = self._gathered_panels()
        return upper.triu() + upper.triu(1).T

    def gram_itself(self) -> Float[Tensor, "inputs inputs"]:
        """``XᵀX``, not copied: not to be modified, and valid until more inputs are added."""
        gram = self._gathered_panels()
        if not self._mirrored:
            for start in range(0, self.inputs, _PANEL):
                stop = start + _PANEL
                gram[stop:, start:stop] = gram[start:stop, stop:].T
                square = gram[start:stop, start:stop]
                square.copy_(square.triu() + square.triu(1).T)
            self._mirrored = True
        return gram

    def gram_above_diagonal(self) -> Float[Tensor, "inputs inputs"]:
        """Return a copy of ``XᵀX`` that is valid only on and above the diagonal."""
        return self._gathered_panels().clone()

    def _gathered_panels(self) -> Tensor:
        self._require(GRAM)
        assert self._panels is not None
        return self._panels

    def _require(self, need: str) -> None:
        if need not in self.needs:
            raise _not_asked_for(need)


@dataclass
class Passage:
    """What a block does to the residual stream, summed over tokens.

    Attributes
    ----------
    tokens
        Number of tokens.
    turns
        Sum of 1 - cos of the states of a token before and after the block.
    """

    tokens: int = 0
    turns: Tensor | float = 0.0

    def add(self, before: Float[Tensor, "*tokens hidden"], after: Float[Tensor, "*tokens hidden"]) -> None:
        """Add a batch."""
        turns = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)
        self.tokens += turns.numel()
        self.turns = self.turns + turns.sum()

    def __add__(self, other: Passage) -> Passage:
        """Return the sums over both sets of tokens."""
        return Passage(self.tokens + other.tokens, self.turns + other.turns)

    @property
    def turn(self) -> float:
        """Mean of 1 - cos."""
        return float(self.turns) / self.tokens


@dataclass(frozen=True)
class Statistics:
    """Everything a scoring method may use besides the weight.

    Attributes
    ----------
    inputs
        Statistics of the projection's inputs; ``None`` for methods that need no text.
    gradient
        Gradient of the mean token loss, float32 ``[outputs, inputs]``.
    curvature
        Hessian of that loss times its gradient, float32 ``[outputs, inputs]``.
    slopes
        Root mean square over the calibration sequences of the gradient of a sequence's mean token loss, float32
        ``[outputs, inputs]``.
    sequences
        Number of calibration sequences.
    seed
        For methods that draw random numbers; differs between projections.
    passage
        What the block does to the residual stream, for methods that score blocks.
    """

    inputs: InputStatistics | None = None
    gradient: Tensor | None = None
    curvature: Tensor | None = None
    seed: int = 0
    slopes: Tensor | None = None
    sequences: int = 0
    passage: Passage | None = None

    @property
    def known_inputs(self) -> InputStatistics:
        """The input statistics; raises ``MethodError`` if they were not requested."""
        if self.inputs is None:
            raise _not_asked_for("one of " + ", ".join(need for need in OF_INPUTS if need != SIMILARITY))
        return self.inputs

    @property
    def known_gradient(self) -> Float[Tensor, "outputs inputs"]:
        """The gradient; raises ``MethodError`` if it was not requested."""
        if self.gradient is None:
            raise _not_asked_for(GRADIENT)
        return self.gradient

    @property
    def known_curvature(self) -> Float[Tensor, "outputs inputs"]:
        """The Hessian times the gradient; raises ``MethodError`` if it was not requested."""
        if self.curvature is None:
            raise _not_asked_for(CURVATURE)
        return self.curvature

    @property
    def known_slopes(self) -> Float[Tensor, "outputs inputs"]:
        """The root mean square of sequences' gradients; raises ``MethodError`` if it was not requested."""
        if self.slopes is None:
            raise _not_asked_for(SLOPES)
        return self.slopes

    @property
    def known_passage(self) -> Passage:
        """What the block does to the residual stream; raises ``MethodError`` if it was not requested."""
        if self.passage is None:
            raise _not_asked_for(SIMILARITY)
        return self.passage


def _not_asked_for(need: str) -> MethodError:
    return MethodError(f"a method reads {need} without requesting it; add it to the needs of its Method")
