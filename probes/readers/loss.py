"""Reader: the loss of every segment's tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pruning.models.anatomy import Anatomy

from ..batches import Batch
from .base import Reader

#: Tokens of the vocabulary whose logits exist at one time: few enough for them to stay in the processor's cache.
_TILE = 2048


class TokenLoss(Reader):
    """Negative log-likelihood of each segment's tokens, every one but the first predicted from those before it.

    Logits are made here from the final state, a slice of the vocabulary at a time, so that they never exist whole:
    a vocabulary of 262 k would take 1 MiB a token.

    Parameters
    ----------
    nll
        Filled in with the sum over predicted tokens, in nats, float64 ``[segments]``.
    predicted
        Filled in with the number of predicted tokens, int64 ``[segments]``.
    anatomy
        Of the model.
    """

    sites = frozenset({"final"})

    def __init__(self, nll: Tensor, predicted: Tensor, anatomy: Anatomy) -> None:
        self.nll = nll
        self.predicted = predicted
        self._anatomy = anatomy
        self._waiting: list[tuple[tuple[int, ...], Tensor, Tensor]] = []

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Score one batch."""
        predicts = (batch.real[:, :-1] * batch.real[:, 1:]).bool()
        hidden = value[:, :-1][predicts]
        targets = batch.ids[:, 1:][predicts]
        losses = -log_likelihood(self._anatomy, hidden, torch.arange(len(targets), device=value.device), targets)
        rows = predicts.nonzero()[:, 0]
        sums = torch.zeros(len(batch.segments), dtype=torch.float64, device=value.device)
        sums.index_add_(0, rows, losses.double())
        self._waiting.append((batch.segments, sums, predicts.sum(dim=1)))

    def flush(self) -> None:
        """Write the sums of the batches that were read."""
        for segments, sums, predicted in self._waiting:
            self.nll[list(segments)] = sums.cpu()
            self.predicted[list(segments)] = predicted.cpu()
        self._waiting.clear()


def log_likelihood(anatomy: Anatomy, hidden: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of tokens after some final states; it can be differentiated.

    Parameters
    ----------
    anatomy
        Of the model.
    hidden
        Normed final states, ``[states, hidden]``.
    index
        For each wanted token, after which of the states, int64 ``[tokens]``.
    tokens
        Their ids, int64 ``[tokens]``.

    Returns
    -------
    Tensor
        In nats, ``[tokens]``, at least float32.
    """
    differentiated = torch.is_grad_enabled() and hidden.requires_grad
    tiles = []
    wanted = torch.zeros(len(tokens), dtype=_precise(hidden), device=hidden.device)
    for start in range(0, anatomy.vocabulary, _TILE):
        inside = ((tokens >= start) & (tokens < start + _TILE)).nonzero()[:, 0]
        place = index[inside], tokens[inside] - start
        if differentiated:  # the logits are made again on the way back: kept, they would be most of the memory
            total, found = checkpoint(_tile, anatomy, hidden, start, place, use_reentrant=False)
        else:
            total, found = _tile(anatomy, hidden, start, place)
        wanted = wanted.index_put((inside,), found)
        tiles.append(total)
    return wanted - torch.stack(tiles).logsumexp(dim=0)[index]


def _tile(anatomy: Anatomy, hidden: Tensor, start: int, place: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the summed exponentials of a tile's logits, and those at some places."""
    logits = anatomy.logits(hidden, slice(start, start + _TILE)).to(_precise(hidden))
    found = logits[place]
    if logits.requires_grad:
        return logits.logsumexp(dim=1), found
    highest = logits.amax(dim=1)
    return logits.sub_(highest[:, None]).exp_().sum(dim=1).log_().add_(highest), found


def _precise(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
