"""Translators: one affine map a block from its states to the dense model's final ones, for a lens.

The tuned lens (Belrose et al. 2023, arXiv 2303.08112) reads ``h + A h + b`` instead of the states ``h`` of a block, so
that early blocks are read in the basis that the head knows. There A and b are trained by gradient descent on the
divergence of predictions. Here they are fitted in closed form, by ridge regression of the final states on those of the
block, as in Din et al. (2023, arXiv 2303.09435): cheaper, and blind to which errors of a state matter to the head. They
are fitted on the dense model only, and on text that is not evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pruning.errors import StudyError, TextError
from pruning.files import PARTIAL, disk_errors, whole_file
from pruning.models.anatomy import Anatomy
from pruning.text.sources import Segment

from .readers.base import Reader
from .readers.sampled import Sample, StoredStates, decoded
from .session import Session
from .streams import DENSE, AtHead

#: Positions in all to fit on, for each dimension of the states.
POSITIONS = 4
#: Ridges that are tried on dimensions of unit variance; the best on the segments that are left out wins.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: Positions that are converted to float64 at a time.
_AT_ONCE = 2048
#: One in so many segments is left out of the fit.
_LEFT_OUT = 8


@dataclass(frozen=True, eq=False)
class Translator:
    """The map ``h + A h + b`` of one block.

    Attributes
    ----------
    weight, bias
        Aᵀ and b, float32 ``[hidden, hidden]`` and ``[hidden]``.
    explained
        Share of the variance of the final states that translated ones explain on segments left out of the fit, mean
        over dimensions, a scalar.
    ridge
        That was chosen, a scalar.
    """

    weight: Tensor
    bias: Tensor
    explained: Tensor
    ridge: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Translate states, ``[positions, hidden]``."""
        wide = states.float()
        return (wide + wide @ self.weight + self.bias).to(states.dtype)


def fitted(
    states: Float[Tensor, "positions hidden"], final: Float[Tensor, "positions hidden"], left_out: Tensor
) -> Translator:
    """Fit the translator of a block by ridge regression, in float64.

    Dimensions are brought to unit variance first: a few of a language model's have variances thousands of times those
    of the others, which a common ridge would leave to themselves.

    Parameters
    ----------
    states, final
        Of the dense model after the block and after the last one, at the same positions.
    left_out
        Which positions choose the ridge instead of being fitted on, bool ``[positions]``.
    """
    target, given = final[~left_out], states[~left_out]
    centre, spread = _moments(given)
    _, wanted_spread = _moments(target)
    shift = torch.zeros_like(centre)
    gram = torch.zeros(len(centre), len(centre), dtype=torch.float64, device=centre.device)
    crossed = torch.zeros_like(gram)
    for some, wanted in zip(given.split(_AT_ONCE), target.split(_AT_ONCE), strict=True):
        x, change = (some.double() - centre) / spread, wanted.double() - some.double()
        gram.addmm_(x.T, x)
        crossed.addmm_(x.T, change)
        shift += change.sum(dim=0)
    gram, crossed, shift = (each / len(given) for each in (gram, crossed, shift))
    tested, wanted = states[left_out].double(), final[left_out].double()
    best: tuple[float, float, Tensor] | None = None
    for ridge in RIDGES:
        raised = gram.clone()
        raised.diagonal().add_(ridge)
        weight = torch.cholesky_solve(crossed, torch.linalg.cholesky(raised)) / spread[:, None]
        error = tested + (tested - centre) @ weight + shift - wanted
        left = float((error.square().mean(dim=0) / wanted_spread.square()).mean())
        if best is None or left < best[0]:
            best = left, ridge, weight
    assert best is not None
    left, ridge, weight = best
    bias = shift - centre @ weight
    numbers = (torch.tensor(number, dtype=torch.float32) for number in (1 - left, ridge))
    return Translator(weight.float(), bias.float(), *numbers)


def _moments(states: Float[Tensor, "positions hidden"]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every dimension, float64 ``[hidden]``."""
    first = states[:1].double()  # taken off so that squares of what all have in common cancel nothing
    total = torch.zeros(2, states.shape[1], dtype=torch.float64, device=states.device)
    for some in states.split(_AT_ONCE):
        rest = some.double() - first
        total += torch.stack([rest.sum(dim=0), rest.square().sum(dim=0)])
    mean, square = total / len(states)
    return mean + first[0], (square - mean.square()).clamp(min=1e-24).sqrt()


class Translators:
    """The translators of a dense model, in one file a block; that of the last block is the identity, and has none.

    Parameters
    ----------
    files
        Block to its file (an attribute, too).
    device
        Where they are used. Only the last one that was used is held there.
    """

    def __init__(self, files: Mapping[int, Path], device: torch.device) -> None:
        self.files = dict(files)
        self._device = device
        self._held: tuple[int, Translator] | None = None

    def at(self, layer: int) -> Translator | None:
        """Return that of one block; ``None`` after the last.

        Raises
        ------
        StudyError
            If its file is damaged.
        """
        if layer not in self.files:
            return None
        if self._held is None or self._held[0] != layer:
            try:
                tensors = load_file(self.files[layer])
                self._held = layer, Translator(**{name: value.to(self._device) for name, value in tensors.items()})
            except (SafetensorError, OSError, TypeError) as error:
                raise StudyError(f"{self.files[layer]} is damaged; delete it and run again") from error
        return self._held[1]

    def translate(self, layer: int, states: Tensor) -> Tensor:
        """Translate the states after one block, ``[positions, hidden]``."""
        translator = self.at(layer)
        return states if translator is None else translator(states)

    def explained(self) -> dict[int, float]:
        """Return how well each block's was fitted; see :class:`Translator`."""
        return {layer: float(translator.explained) for layer in self.files if (translator := self.at(layer))}


class TranslatorStream:
    """Text that translators are fitted on, read by the dense model only: its states at sampled positions.

    Parameters
    ----------
    session
        The dense model's session.
    segments
        Text of one language.
    positions, seed
        Number of positions at most, and seed of their draw.

    Attributes
    ----------
    sample
        The positions.
    """

    compares = False
    models: tuple[str, ...] = (DENSE,)
    files: Mapping[str, Path] = {}
    at_head = AtHead(all_tokens=False)

    def __init__(self, session: Session, segments: Sequence[Segment], *, positions: int, seed: int = 0) -> None:
        batches = session.batches(segments)
        self.sample = Sample.of(batches, positions, seed)
        self.batches = [batch for batch in decoded(batches) if batch.segments in self.sample.places]
        self._first = session.anatomy.stacks[-1].first
        self._readers: list[Reader] = []

    def keep_in(self, states: Tensor) -> None:
        """Have states written to a tensor ``[layers, positions, hidden]``."""
        self._readers = [StoredStates(self.sample, states, self._first)]

    def opened(self) -> AbstractContextManager[object]:
        """See :class:`probes.streams.Stream`."""
        return ExitStack()

    def readers(self, model: str, batch: int) -> Sequence[Reader]:
        """See :class:`probes.streams.Stream`."""
        return self._readers


def fitting_work(anatomy: Anatomy) -> float:
    """Return about how many multiply-adds fitting all translators takes, beside reading."""
    stack, cube = anatomy.stacks[-1], float(anatomy.hidden_size) ** 3
    return (stack.stop - stack.first - 1) * cube * (2 * POSITIONS + len(RIDGES) * (7 / 6 + POSITIONS / _LEFT_OUT))


def translator_bytes(anatomy: Anatomy) -> int:
    """Return about how much all translators take on disk."""
    stack, width = anatomy.stacks[-1], anatomy.hidden_size
    return (stack.stop - stack.first - 1) * (width + 1) * width * 4


def translator_streams(
    session: Session, text: Mapping[str, Sequence[Segment]], seed: int = 0
) -> list[TranslatorStream]:
    """Return what translators are fitted on: :data:`POSITIONS` a dimension, as many of each language."""
    each = -(-POSITIONS * session.anatomy.hidden_size // len(text))
    return [TranslatorStream(session, segments, positions=each, seed=seed) for segments in text.values()]


def translator_files(anatomy: Anatomy, folder: Path) -> dict[int, Path]:
    """Return the file of every block's translator: those of the last stack but its last block."""
    stack = anatomy.stacks[-1]
    return {layer: folder / f"{layer}.safetensors" for layer in range(stack.first, stack.stop - 1)}


def fit_all(
    session: Session,
    streams: Sequence[TranslatorStream],
    read: Callable[[Sequence[TranslatorStream]], None],
    files: Mapping[int, Path],
) -> None:
    """Read the streams with the dense model, and write the translator of every block but the last.

    Between reading and fitting, states are in a file: those of 16,384 positions after 32 blocks of width 4096 take
    4 GiB in bfloat16. Fitting takes some 16 × hidden³ multiply-adds a block.

    Parameters
    ----------
    session
        The dense model's.
    streams
        As :func:`translator_streams` returns them.
    read
        Reads streams.
    files
        Block to the file of its translator, as from :func:`translator_files`.

    Raises
    ------
    TextError
        If there is too little text to leave some of it out of the fit.
    """
    if not files:  # a model of one block
        return
    left_out = torch.cat([stream.sample.segment % _LEFT_OUT == 0 for stream in streams])
    if left_out.all() or not left_out.any():
        raise TextError("a tuned lens is fitted on several segments and tested on others; add text to fit it on")
    anatomy = session.anatomy
    stack, sizes = anatomy.stacks[-1], [len(stream.sample) for stream in streams]
    shape = (stack.stop - stack.first, sum(sizes), anatomy.hidden_size)
    dtype = next(anatomy.blocks[0].parameters()).dtype
    scratch = next(iter(files.values())).parent / f"states{PARTIAL}"
    scratch.parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk_errors(scratch):
            states = torch.from_file(str(scratch), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        for stream, own in zip(streams, states.split(sizes, dim=1), strict=True):
            stream.keep_in(own)
        read(streams)
        final, left_out = states[-1].to(anatomy.device), left_out.to(anatomy.device)
        for layer, path in files.items():
            found = fitted(states[layer - stack.first].to(anatomy.device), final, left_out)
            with whole_file(path) as partial:
                save_file({name: value.cpu().contiguous() for name, value in vars(found).items()}, partial)
    finally:
        scratch.unlink(missing_ok=True)
