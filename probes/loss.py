"""Reader: the loss of every segment's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.anatomy import Anatomy

from .session import Batch

#: Tokens of the vocabulary whose logits exist at one time: few enough for them to stay in the processor's cache.
_TILE = 2048


class TokenLoss:
    """Negative log-likelihood of each segment's tokens, every one but the first predicted from those before it.

    Logits are made here from the final state, a slice of the vocabulary at a time, so that they never exist whole:
    a vocabulary of 262 k would take 1 MiB a token.

    Attributes
    ----------
    nll
        Sum over predicted tokens, in nats, float64 ``[segments]``.
    predicted
        Number of predicted tokens, int64 ``[segments]``.
    """

    sites = frozenset({"final"})

    def __init__(self, segments: int, anatomy: Anatomy) -> None:
        self.nll = torch.zeros(segments, dtype=torch.float64)
        self.predicted = torch.zeros(segments, dtype=torch.int64)
        self._anatomy = anatomy

    def read(self, layer: int, site: str, value: Tensor, batch: Batch) -> None:
        """Score one batch."""
        predicts = (batch.real[:, :-1] * batch.real[:, 1:]).bool()
        hidden = value[:, :-1][predicts]
        targets = batch.ids[:, 1:][predicts]
        losses = _negative_log_likelihood(self._anatomy, hidden, targets)
        rows = predicts.nonzero()[:, 0]
        sums = torch.zeros(len(batch.segments), dtype=torch.float64, device=value.device)
        sums.index_add_(0, rows, losses.double())
        self.nll[list(batch.segments)] = sums.cpu()
        self.predicted[list(batch.segments)] = predicts.sum(dim=1).cpu()


def _negative_log_likelihood(anatomy: Anatomy, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return ``logsumexp(logits) − logit of the target``, float32 ``[tokens]``."""
    tiles = []
    wanted = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for start in range(0, anatomy.vocabulary, _TILE):
        logits = anatomy.logits(hidden, slice(start, start + _TILE)).float()
        inside = ((targets >= start) & (targets < start + _TILE)).nonzero()[:, 0]
        wanted[inside] = logits[inside, targets[inside] - start]
        highest = logits.amax(dim=1)
        tiles.append(logits.sub_(highest[:, None]).exp_().sum(dim=1).log_().add_(highest))
    return torch.stack(tiles).logsumexp(dim=0) - wanted
