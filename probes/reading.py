"""What was read of one model in one language, and how dense and pruned models are read together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pruning.errors import ModelError, StudyError
from pruning.files import whole_file
from pruning.models.anatomy import Anatomy
from pruning.text.sources import Segment
from pruning.variants.variant import DenseCopy, Variant

from .readers.firing import NeuronFiring
from .readers.hidden_states import PooledStates
from .readers.loss import TokenLoss
from .readers.signal import SIGNAL_SITES, DenseSignal, SignalError
from .session import Batch, Reader, Session, within_memory

#: The dense model's name among the variants.
DENSE = "dense"
#: Bytes of dense activations kept at a time to compare pruned models with.
_DENSE_BYTES = 1 << 30


@dataclass(frozen=True)
class Readings:
    """Everything that the analyzers need of one model in one language: sums, never whole activations.

    Attributes
    ----------
    pooled
        Mean hidden state of each segment after each block, float32 ``[segments, layers, hidden]``.
    fired
        Tokens on which each MLP neuron fires, int32 ``[folds, layers, neurons]``, where segment i is counted in fold
        i mod :data:`probes.readers.firing.FOLDS`; no neurons in a mixture of experts.
    tokens
        Counted tokens of each segment, int64 ``[segments]``.
    nll
        Negative log-likelihood of each segment in nats, float64 ``[segments]``.
    predicted
        Predicted tokens of each segment, int64 ``[segments]``.
    utf8_bytes
        Length of each segment, as far as it was read, int64 ``[segments]``.
    power
        The dense model's ``Σ‖x‖²`` over a segment's counted tokens, float64 ``[segments, layers, sites]``, sites as in
        :data:`probes.readers.signal.SIGNAL_SITES`; NaN where a block lacks the site.
    error
        ``Σ‖x − x̂‖²`` of this model against the dense one, likewise; zero for the dense model itself.
    """

    pooled: Tensor
    fired: Tensor
    tokens: Tensor
    nll: Tensor
    predicted: Tensor
    utf8_bytes: Tensor
    power: Tensor
    error: Tensor

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        with whole_file(path) as partial:
            save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, partial)

    @classmethod
    def open(cls, path: Path) -> Readings:
        """Read what :meth:`save` wrote.

        Raises
        ------
        StudyError
            If the file is damaged.
        """
        try:
            return cls(**load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            raise StudyError(f"{path} is damaged; delete it and run again") from error


#: Called with the tokens that a model has just read.
Progress = Callable[[int], None]


def read_against_dense(
    session: Session,
    segments: Sequence[Segment],
    variants: Sequence[Variant] = (),
    progress: Progress = lambda tokens: None,
) -> dict[str, Readings]:
    """Read the dense model and any number of its variants on the same segments.

    The dense model goes first through some batches, whose activations are kept; then each variant is applied and
    compared with them. So the dense model runs once, however many variants there are, and memory does not grow with the
    text.

    Parameters
    ----------
    session
        Of the dense model.
    segments
        Text of one language.
    variants
        Of the same model.
    progress
        Told of the tokens as they are read, by one model after another.

    Returns
    -------
    dict
        ``"dense"`` and every variant's id to its readings.
    """
    dense_signal = DenseSignal(len(segments), len(session.anatomy.blocks))
    sums = {DENSE: _Sums(session, len(segments))}
    errors = {DENSE: torch.full_like(dense_signal.power, torch.nan)}
    for variant in variants:
        sums[variant.id] = _Sums(session, len(segments))
        errors[variant.id] = torch.full_like(dense_signal.power, torch.nan)

    copy = DenseCopy(session.model)
    for group in _grouped(session, session.batches(segments)):
        references = []
        for batch in group:
            session.read(batch, [*sums[DENSE].readers, dense_signal])
            references.append(dense_signal.take_activations())
            progress(int(batch.real.sum()))
        for variant in variants:
            with copy.pruned_to(variant):
                for batch, reference in zip(group, references, strict=True):
                    session.read(batch, [*sums[variant.id].readers, SignalError(reference, errors[variant.id])])
                    progress(int(batch.real.sum()))

    errors[DENSE][~dense_signal.power.isnan()] = 0
    utf8 = torch.tensor([_bytes_read(session, segment) for segment in segments])
    return {
        name: Readings(
            pooled=read.pooled.means,
            fired=read.firing.fired,
            tokens=dense_signal.tokens,
            nll=read.loss.nll,
            predicted=read.loss.predicted,
            utf8_bytes=utf8,
            power=dense_signal.power,
            error=errors[name],
        )
        for name, read in sums.items()
    }


def pooled_states(session: Session, segments: Sequence[Segment], progress: Progress = lambda tokens: None) -> Tensor:
    """Return the mean hidden state of each segment after each block, float32 ``[segments, layers, hidden]``."""
    anatomy = session.anatomy
    reader = PooledStates(len(segments), len(anatomy.blocks), anatomy.hidden_size)
    for batch in session.batches(segments):
        session.read(batch, [reader])
        progress(int(batch.real.sum()))
    return reader.means


class _Sums:
    """The readers of one model that need no other."""

    def __init__(self, session: Session, segments: int) -> None:
        anatomy = session.anatomy
        self.pooled = PooledStates(segments, len(anatomy.blocks), anatomy.hidden_size)
        self.firing = NeuronFiring(len(anatomy.blocks), _readable_neurons(anatomy))
        self.loss = TokenLoss(segments, anatomy)
        self.readers: list[Reader] = [self.pooled, self.loss]
        if self.firing.fired.numel():
            self.readers.append(self.firing)


def _readable_neurons(anatomy: Anatomy) -> int:
    """Return the MLP neurons of a block, 0 if they cannot be read in every block."""
    if not all("activation" in anatomy.sites(layer) for layer in range(len(anatomy.blocks))):
        return 0
    try:
        return anatomy.n_neurons
    except ModelError:
        return 0


def _grouped(session: Session, batches: list[Batch]) -> Iterator[list[Batch]]:
    """Yield runs of batches whose dense activations fit the memory set aside for them."""
    anatomy = session.anatomy
    element = anatomy.weight(0, "q").element_size()
    width = sum(anatomy.shape(layer, role)[0] for layer, role in anatomy if role in SIGNAL_SITES)
    width += len(anatomy.blocks) * anatomy.hidden_size
    sizes = [batch.ids.numel() * width * element for batch in batches]
    return within_memory(batches, sizes, _DENSE_BYTES)


def _bytes_read(session: Session, segment: Segment) -> int:
    """Return the bytes of the part of a segment that `max_length` leaves."""
    encoded = session.tokenizer(
        segment.text, truncation=True, max_length=session.max_length, return_offsets_mapping=True
    )
    end = max(stop for _, stop in encoded["offset_mapping"])
    return len(segment.text[:end].encode("utf-8"))
