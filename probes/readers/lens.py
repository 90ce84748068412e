"""Reader: what a model would predict after every block, against the dense model's final prediction.

The logit lens (nostalgebraist 2020): the states after a block go through the final norm and the head as if no block
followed. A tuned lens translates them before (:mod:`probes.translators`). The head costs vocabulary × width for each of
them, which is why only a sample of positions is read, and logits exist for a slice of the vocabulary at a time, as for
the loss. Beside the logits of a block those of the dense model's final states are computed again, slice by slice: kept,
they would take 1 MiB a position at a vocabulary of 262 k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.models.anatomy import Anatomy
from pruning.models.arithmetic import fast_float32
from pruning.variants.others import dense_again, is_replaced

from .loss import tile_rows
from .sampled import Sample, SampledStates

#: What is summed over the positions of a segment: the divergence KL(dense model's final prediction ‖ this one) and the
#: entropy of this one, in nats; the loss of the token that follows, in nats; and whether both have the same most likely
#: token.
LENS_SUMS = ("kl", "entropy", "loss", "agreement")
#: Turns the states after a block, ``[positions, hidden]``, into what the final norm is given.
Lens = Callable[[int, Tensor], Tensor]
#: Positions whose logits exist at a time.
AT_ONCE = 1024


def as_it_is(layer: int, states: Tensor) -> Tensor:
    """Return states as they are: the logit lens."""
    return states


@dataclass(frozen=True, eq=False)
class Reference:
    """The dense model's final prediction at some positions.

    Attributes
    ----------
    states
        Its normed final states, ``[positions, hidden]``.
    log_total
        Logarithm of the summed exponentials of its logits, float64 ``[positions]``.
    top
        Its most likely tokens, int64 ``[positions]``.
    """

    states: Tensor
    log_total: Tensor
    top: Tensor

    @classmethod
    def of(cls, anatomy: Anatomy, states: Tensor) -> Reference:
        """Return the prediction from normed final states; the head must be loaded."""
        parts = [_total_and_top(anatomy, some) for some in states.split(AT_ONCE)]
        return cls(states, torch.cat([total for total, _ in parts]), torch.cat([top for _, top in parts]))

    def at(self, index: Tensor) -> Reference:
        """Return that of some of the positions."""
        return Reference(self.states[index], self.log_total[index], self.top[index])


class BlockPredictions(SampledStates):
    """Compares the prediction after every block with the dense model's final one.

    Parameters
    ----------
    anatomy
        Of the model; its final norm and head must be loaded wherever :meth:`flush` is called.
    sample
        The positions.
    reference
        The dense model's final prediction at them.
    kinds
        Kind of every token of the vocabulary, by which probability is summed, int64 ``[vocabulary]``.
    sums
        Added to, float64 ``[lenses, layers, segments, sums]``, as in :data:`LENS_SUMS`.
    mass
        Likewise with the probability of each kind of token, float64 ``[lenses, layers, segments, kinds]``.
    lenses
        The lenses that states are read through; by default the logit lens, which changes nothing.
    first
        The first block that is read, which is the first of `sums` and `mass`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        sample: Sample,
        reference: Reference,
        kinds: Tensor,
        sums: Tensor,
        mass: Tensor,
        lenses: Sequence[Lens] = (),
        first: int = 0,
    ) -> None:
        super().__init__(sample, "residual", first)
        self._anatomy = anatomy
        self._reference = reference
        self._kinds = kinds
        self._lenses = lenses or (as_it_is,)
        self.sums = sums
        self.mass = mass

    @torch.no_grad()
    def flush(self) -> None:
        """Predict from the states that were gathered, and add up by segment."""
        for layer, index, states in self.taken():
            segments, place = self.sample.segment[index.cpu()], layer - self._first
            for sums, mass, lens in zip(self.sums, self.mass, self._lenses, strict=True):
                parts = zip(states.split(AT_ONCE), index.split(AT_ONCE), strict=True)
                found = torch.cat([self._predicted(lens(layer, some), where) for some, where in parts]).cpu()
                sums[place].index_add_(0, segments, found[:, : len(LENS_SUMS)])
                mass[place].index_add_(0, segments, found[:, len(LENS_SUMS) :])

    def _predicted(self, states: Tensor, where: Tensor) -> Tensor:
        return predictions(
            self._anatomy,
            self._anatomy.normed(states),
            self._reference.at(where),
            self.sample.following[where],
            self._kinds,
            self.mass.shape[-1],
        )


@torch.no_grad()
def predictions(
    anatomy: Anatomy, states: Tensor, reference: Reference, following: Tensor, kinds: Tensor, n_kinds: int
) -> Tensor:
    """Compare what is predicted from some states with a reference.

    Parameters
    ----------
    anatomy
        Of the model, whose head is loaded.
    states
        Normed states, ``[positions, hidden]``.
    reference
        The dense model's final prediction at the same positions.
    following
        The tokens that follow, int64 ``[positions]``.
    kinds, n_kinds
        Kind of every token, int64 ``[vocabulary]``, and how many there are.

    Returns
    -------
    Tensor
        Float64 ``[positions, sums + kinds]``: :data:`LENS_SUMS`, then the probability of each kind.
    """
    both = torch.cat([states, reference.states])
    end = anatomy.names_for_end()
    apart = end if is_replaced(anatomy, end) else []  # the reference goes through the dense model's head
    numbers = torch.arange(n_kinds, device=states.device)
    crossed = torch.zeros(2, len(states), dtype=torch.float64, device=states.device)  # Σ p (log p − logit), and Σ p
    wanted = torch.zeros(len(states), dtype=torch.float64, device=states.device)
    highest, tops, totals = [], [], []
    for tile in _tiles(anatomy, states):
        if apart:
            with dense_again(anatomy, apart):
                dense = _logits(anatomy, reference.states, tile)
            logits = _logits(anatomy, states, tile)
        else:
            logits, dense = _logits(anatomy, both, tile).chunk(2)
        logs = dense - reference.log_total[:, None].to(dense.dtype)
        shares = logs.exp()
        crossed += torch.stack([(shares * (logs - logits)).sum(dim=1), shares.sum(dim=1)])
        found = logits.gather(1, (following - tile.start).clamp(0, logits.shape[1] - 1)[:, None])[:, 0].double()
        wanted = torch.where((following >= tile.start) & (following < tile.stop), found, wanted)
        high, top = logits.max(dim=1)
        weights = (logits - high[:, None]).exp_()
        of_kind = weights @ (kinds[tile][:, None] == numbers).to(weights.dtype)
        highest.append(high.double())
        tops.append(top + tile.start)
        totals.append(torch.cat([(weights * logits).sum(dim=1, keepdim=True), of_kind], dim=1).double())
    high, where = torch.stack(highest).max(dim=0)
    scale = (torch.stack(highest) - high).exp()
    energy, mass = (torch.stack(totals) * scale[..., None]).sum(dim=0).split([1, n_kinds], dim=1)
    total = mass.sum(dim=1)
    log_total = high + total.log()
    top = torch.stack(tops).gather(0, where[None])[0]
    sums = [
        crossed[0] + crossed[1] * log_total,
        log_total - energy[:, 0] / total,
        log_total - wanted,
        (top == reference.top).double(),
    ]
    return torch.cat([torch.stack(sums, dim=1), mass / total[:, None]], dim=1)


def _total_and_top(anatomy: Anatomy, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the summed exponentials of all logits, and the most likely tokens."""
    totals, highest, tops = [], [], []
    with torch.no_grad():
        for tile in _tiles(anatomy, states):
            logits = _logits(anatomy, states, tile)
            high, top = logits.max(dim=1)
            totals.append(logits.logsumexp(dim=1).double())
            highest.append(high)
            tops.append(top + tile.start)
    where = torch.stack(highest).max(dim=0).indices
    return torch.stack(totals).logsumexp(dim=0), torch.stack(tops).gather(0, where[None])[0]


def _tiles(anatomy: Anatomy, states: Tensor) -> list[slice]:
    rows = tile_rows(states.device)
    return [slice(start, min(start + rows, anatomy.vocabulary)) for start in range(0, anatomy.vocabulary, rows)]


def _logits(anatomy: Anatomy, states: Tensor, tile: slice) -> Tensor:
    with fast_float32(states.device):
        return anatomy.precise_logits(states, tile)
