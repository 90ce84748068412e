"""Reading text with dense and pruned models in one call, the plan made on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pruning.text.sources import Segment
from pruning.variants.others import numel_of
from pruning.variants.variant import Variant

from .lens import LensReadings, LensStream, TokenLanguages
from .lockstep import Progress, read_streams
from .reading_plan import plan_reading
from .readings import Readings
from .session import Session
from .streams import DENSE, FittingStream, HeldoutStream
from .translators import Translators, fit_all, translator_files, translator_streams


def read_against_dense(
    session: Session,
    segments: Sequence[Segment],
    variants: Sequence[Variant] = (),
    progress: Progress = lambda tokens: None,
) -> dict[str, Readings]:
    """Read the dense model and any number of its variants on the same segments, in lockstep.

    Parameters
    ----------
    session
        Of the dense model.
    segments
        Text of one language.
    variants
        Of the same model.
    progress
        Told of the tokens as they are read.

    Returns
    -------
    dict
        ``"dense"`` and every variant's id to its readings.
    """
    stream = HeldoutStream(session, segments, [variant.id for variant in variants])
    replaced = max((numel_of(variant.others) for variant in variants), default=0)
    plan = plan_reading(session, [stream], trial=False, replaced=replaced)
    read_streams(session, [stream], {variant.id: variant for variant in variants}, plan, progress)
    return stream.readings


def pooled_states(session: Session, segments: Sequence[Segment], progress: Progress = lambda tokens: None) -> Tensor:
    """Return the dense model's mean hidden state of each segment after each block.

    Returns
    -------
    Tensor
        float32 ``[segments, layers, hidden]``.
    """
    stream = FittingStream(session, segments)
    read_streams(session, [stream], {}, plan_reading(session, [stream], trial=False), progress)
    return stream.pooled.transpose(0, 1)


def read_lens(
    session: Session,
    segments: Sequence[Segment],
    languages: TokenLanguages,
    variants: Sequence[Variant] = (),
    *,
    tokens: int = 256,
    seed: int = 0,
    translators: Translators | None = None,
    progress: Progress = lambda tokens: None,
) -> dict[str, LensReadings]:
    """Read what the dense model and its variants would predict after every block, at a sample of positions.

    Parameters
    ----------
    session
        Of the dense model.
    segments
        Text of one language.
    languages
        Of the tokens that are predicted.
    variants
        Of the same model.
    tokens, seed
        Number of positions, the same ones for all models, and seed of their draw.
    translators
        As from :func:`fit_translators`, to read through the tuned lens, too.
    progress
        Told of the tokens as they are read.

    Returns
    -------
    dict
        ``"dense"`` and every variant's id to its readings.

    Raises
    ------
    TextError
        If the text has no position to sample.
    """
    models = [DENSE, *(variant.id for variant in variants)]
    stream = LensStream(session, segments, models, tokens=tokens, seed=seed, tuned=translators is not None)
    reference = stream.reference()
    replaced = max((numel_of(variant.others) for variant in variants), default=0)
    plan = plan_reading(session, [stream, reference], trial=False, replaced=replaced)
    read_streams(session, [reference], {}, plan, progress)
    stream.prepare(reference, languages, translators)
    read_streams(session, [stream], {variant.id: variant for variant in variants}, plan, progress)
    return stream.readings


def fit_translators(
    session: Session,
    text: Mapping[str, Sequence[Segment]],
    folder: Path,
    *,
    seed: int = 0,
    progress: Progress = lambda tokens: None,
) -> Translators:
    """Fit the affine maps of a tuned lens on the dense model.

    Parameters
    ----------
    session
        Of the dense model.
    text
        By language; not what is evaluated.
    folder
        Where they are written, one file a block.
    seed
        Of the draw of positions.
    progress
        Told of the tokens as they are read.

    Raises
    ------
    TextError
        If there is too little text.
    """
    streams = translator_streams(session, text, seed)
    plan = plan_reading(session, streams, trial=False)
    files = translator_files(session.anatomy, folder)
    fit_all(session, streams, lambda some: read_streams(session, some, {}, plan, progress), files)
    return Translators(files, session.anatomy.device)
