"""A linear part of a projection's inputs, which can be given less weight in their statistics.

The part is that of the residual stream that lies in a subspace. A projection reads the stream through a norm,
``x = D h / s + b``: s is the norm's scale of each token, D the diagonal of its gains, b its shift, which most norms do
not have. With B an orthonormal basis of the subspace, ``T = I - (1 - w) B Bᵀ`` leaves a share w of the part, and inputs
become

    x' = D T D⁻¹ (x - b) + b = x - (1 - w) u Fᵀ,    u = (x - b) D⁻¹ B,    F = D B.

s is that of the unchanged stream. Sums of x'² and of products of x' follow for any w from those of x and two small
ones, ``C = Σ xᵀ u`` and ``S = Σ uᵀ u``, so that all w share one pass of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

#: Gains below this share of the largest one count as 0: what such an input reads of the stream is lost in rounding.
_NO_GAIN = 1e-6
#: Directions of a subspace that keep less of their length once the mean is taken out count as constant.
_CONSTANT = 1e-4


@dataclass(frozen=True)
class InputPart:
    """Where the part lies in the inputs of a projection, and how it is read from them.

    Attributes
    ----------
    reader
        ``D⁻¹ B``, float32 ``[inputs, rank]``: what the part is read with; 0 where the gain is 0.
    writer
        ``F = D B``, float32 ``[inputs, rank]``: what it adds to the inputs.
    shift
        ``b D⁻¹ B``, float32 ``[rank]``.
    """

    reader: Tensor
    writer: Tensor
    shift: Tensor

    @classmethod
    def of(
        cls,
        basis: Float[Tensor, "inputs rank"],
        gain: Float[Tensor, " inputs"],
        shift: Float[Tensor, " inputs"] | None = None,
        *,
        centred: bool = False,
    ) -> InputPart:
        """Return the part of the stream in a subspace, as it is in the inputs behind a norm.

        Parameters
        ----------
        basis
            Orthonormal columns.
        gain, shift
            Of the norm.
        centred
            Whether the norm subtracts the mean of the stream over its dimensions (LayerNorm). Projections then read
            the centred stream, in which the same means of languages span the centred subspace.
        """
        basis, gain = basis.double(), gain.double()
        if centred:
            left, lengths, _ = torch.linalg.svd(basis - basis.mean(dim=0), full_matrices=False)
            basis = left[:, lengths > _CONSTANT]
        inverse = torch.where(gain.abs() > _NO_GAIN * gain.abs().max(), 1 / gain, 0.0)
        reader = inverse[:, None] * basis
        moved = torch.zeros_like(gain) if shift is None else shift.double()
        return cls(reader.float(), (gain[:, None] * basis).float(), (moved @ reader).float())

    def to(self, device: torch.device) -> InputPart:
        """Return it on a device."""
        return InputPart(*(tensor.to(device) for tensor in (self.reader, self.writer, self.shift)))


class PartSums:
    """Sums over tokens by which statistics of the inputs follow for any weight of a part.

    Parameters
    ----------
    part
        The part.
    """

    def __init__(self, part: InputPart) -> None:
        self.part = part
        self._with_inputs = torch.zeros_like(part.writer)
        self._own = part.writer.new_zeros(part.writer.shape[1], part.writer.shape[1])

    def add(self, rows: Float[Tensor, "tokens inputs"]) -> None:
        """Add a batch of inputs, float32."""
        coordinates = rows @ self.part.reader - self.part.shift
        self._with_inputs.addmm_(rows.T, coordinates)
        self._own.addmm_(coordinates.T, coordinates)

    def __add__(self, other: PartSums) -> PartSums:
        """Return the sums over both sets of tokens."""
        total = PartSums(self.part)
        total._with_inputs = self._with_inputs + other._with_inputs
        total._own = self._own + other._own
        return total

    def squares(self, squares: Float[Tensor, " inputs"], weight: float) -> Float[Tensor, " inputs"]:
        """Return the sums of squares of the inputs, given the plain ones, with the part at a weight."""
        return (squares - 2 * (self._less(weight) * self.part.writer).sum(dim=1)).clamp_(min=0)

    def gram(self, gram: Float[Tensor, "inputs inputs"], weight: float) -> Float[Tensor, "inputs inputs"]:
        """Return the Gram matrix of the inputs, given the plain one, with the part at a weight."""
        less, writer = self._less(weight), self.part.writer
        return torch.addmm(gram, torch.cat([less, writer], dim=1), torch.cat([writer, less], dim=1).T, alpha=-1)

    def _less(self, weight: float) -> Float[Tensor, "inputs rank"]:
        """Return P in ``X'ᵀX' = XᵀX - P Fᵀ - F Pᵀ``: ``(1 - w) C - (1 - w)² F S / 2``."""
        less = 1 - weight
        return less * self._with_inputs - (less**2 / 2) * (self.part.writer @ self._own)
