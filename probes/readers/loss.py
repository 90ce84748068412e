"""Reader: the loss of every segment's tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pruning.models.anatomy import Anatomy
from pruning.models.arithmetic import fast_float32

from ..batches import Batch
from .base import Reader


def tile_rows(device: torch.device) -> int:
    """Return for how many tokens of the vocabulary logits exist at one time.

    Few enough for them to stay in a processor's cache, or enough to keep a GPU busy.
    """
    return 1024 if device.type == "cpu" else 8192


class TokenLoss(Reader):
    """Negative log-likelihood of each segment's counted tokens, each predicted from those before it.

    The first token of a segment is never predicted.

    Logits are made here from the final state, a slice of the vocabulary at a time, so that they never exist whole:
    a vocabulary of 262 k would take 1 MiB a token. They are float32 in a 16-bit model, too.

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
        predicted = batch.predicted
        hidden = value[:, :-1][predicted]
        targets = batch.ids[:, 1:][predicted]
        losses = -log_likelihood(self._anatomy, hidden, torch.arange(len(targets), device=value.device), targets)
        rows = predicted.nonzero()[:, 0]
        sums = torch.zeros(len(batch.segments), dtype=torch.float64, device=value.device)
        sums.index_add_(0, rows, losses.double())
        self._waiting.append((batch.segments, sums, predicted.sum(dim=1)))

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
    rows = tile_rows(hidden.device)
    wanted = torch.zeros(len(tokens), dtype=_precise(hidden), device=hidden.device)
    tiles = []
    for start in range(0, anatomy.vocabulary, rows):
        tile = slice(start, min(start + rows, anatomy.vocabulary))
        if differentiated:  # the logits are made again on the way back: kept, they would be most of the memory
            total, found = checkpoint(_tile, anatomy, hidden, tile, index, tokens, use_reentrant=False)
        else:
            total, found = _tile(anatomy, hidden, tile, index, tokens)
        wanted = torch.where((tokens >= tile.start) & (tokens < tile.stop), found, wanted)
        tiles.append(total)
    return wanted - torch.stack(tiles).logsumexp(dim=0)[index]


def _tile(anatomy: Anatomy, hidden: Tensor, tile: slice, index: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the summed exponentials of a tile's logits, and those of the tokens that are in it.

    For tokens that are not, it gives those of others: to look for them would make a GPU wait.
    """
    with fast_float32(hidden.device):
        logits = anatomy.precise_logits(hidden, tile)
    found = logits[index, (tokens - tile.start).clamp(0, logits.shape[1] - 1)]
    if logits.requires_grad:
        return logits.logsumexp(dim=1), found
    highest = logits.amax(dim=1)
    return logits.sub_(highest[:, None]).exp_().sum(dim=1).log_().add_(highest), found


def _precise(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
