"""What a study's lens reads and fits, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from probes import DENSE, LensStream, Translators
from probes.readers.lens import LENS_SUMS
from probes.streams import Stream
from probes.translators import (
    TranslatorStream,
    fit_all,
    fitting_work,
    translator_bytes,
    translator_files,
    translator_streams,
)
from pruning.files import content_sha256

from .context import Context

_TRANSLATORS = f"translators/{DENSE}/all"


def lens_stream(context: Context, language: str, models: Sequence[str]) -> LensStream:
    """Return what some models read in a language."""
    config = context.study.lens.model_dump(include={"tokens", "seed", "tuned"})
    return LensStream(context.model.session, context.texts.heldout[language], models, **config)


def lens_work(context: Context, models: int, tokens: int, *, alone: bool) -> float:
    """Return the multiply-adds of a lens on a text.

    Parameters
    ----------
    context
        Of the study.
    models, tokens
        How many models read it, and its length.
    alone
        Whether they read it for the lens only.
    """
    facts, config = context.model.facts, context.study.lens
    blocks = facts.blocks - facts.encoder_blocks
    at_head = 2 * (1 + config.tuned) * min(config.tokens, tokens) * blocks * facts.head
    return models * at_head + (1 + models * alone) * tokens * facts.body


def lens_bytes(context: Context) -> int:
    """Return the size of the file of one model's predictions in one language."""
    facts, study = context.model.facts, context.study
    values = len(LENS_SUMS) + len(study.languages) + 2
    return (1 + study.lens.tuned) * (facts.blocks - facts.encoder_blocks) * study.evaluation.segments * values * 8


class TunedLens:
    """The translators of a study's tuned lens.

    Parameters
    ----------
    context
        Of the study.
    reading
        Hash of how text is read.

    Attributes
    ----------
    key
        Hash of everything that they depend on.
    """

    def __init__(self, context: Context, reading: str) -> None:
        self._context = context
        of_text = [context.texts.fitting_fingerprints[language] for language in context.study.languages]
        self.key = content_sha256([reading, of_text, context.study.lens.seed])

    @property
    def missing(self) -> bool:
        """Whether the study has a tuned lens that is not fitted yet."""
        return self._context.study.lens.tuned and not self._context.records.finished(_TRANSLATORS, self.key)

    def streams(self) -> list[TranslatorStream]:
        """Return what it is fitted on."""
        return translator_streams(
            self._context.model.session, self._context.texts.fitting, self._context.study.lens.seed
        )

    def fitted(self, read: Callable[[Sequence[Stream]], None]) -> Translators | None:
        """Return the translators, which are fitted first if they are not there; none if the study has no tuned lens."""
        if not self._context.study.lens.tuned:
            return None
        began, anatomy = time.monotonic(), self._context.model.anatomy
        files = translator_files(anatomy, self._context.folder / "readings" / DENSE / "translators")
        if self.missing:
            self._context.tell("fitting the tuned lens")
            fit_all(self._context.model.session, self.streams(), read, files)
            self._context.records.finish(_TRANSLATORS, self.key, list(files.values()), time.monotonic() - began)
        return Translators(files, anatomy.device)

    @property
    def work(self) -> float:
        """Multiply-adds of fitting it."""
        tokens = sum(batch.n_tokens for stream in self.streams() for batch in stream.batches)
        return tokens * self._context.model.facts.body + fitting_work(self._context.model.anatomy)

    @property
    def kept(self) -> int:
        """Bytes of the translators on disk."""
        return translator_bytes(self._context.model.anatomy)

    @property
    def scratch(self) -> int:
        """Bytes on disk of the states that it is fitted on, for a while."""
        anatomy = self._context.model.anatomy
        stack, positions = anatomy.stacks[-1], sum(len(stream.sample) for stream in self.streams())
        return (stack.stop - stack.first) * positions * anatomy.hidden_size * anatomy.element_size
