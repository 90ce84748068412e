"""How long units of work take: by trials on this machine, or by figures for a machine elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch

from probes import FittingStream, ReadingPlan, plan_reading
from probes.reading_plan import READERS
from pruning.engine.plan import WaveCost, variant_bytes
from pruning.errors import StudyError

from ..context import Context
from ..units import Unit

#: An import reads a checkpoint and compares it with the dense one, matrix by matrix: its time in loads of the model.
_IMPORT = 3.0


@runtime_checkable
class Pace(Protocol):
    """Times in seconds.

    Attributes
    ----------
    trial
        Whether plans include trials.
    """

    @property
    def trial(self) -> bool: ...

    def loading(self) -> float:
        """Return how long a worker takes to load the model."""

    def wave(self, cost: WaveCost) -> float:
        """Return how long a wave of pruning takes."""

    def importing(self) -> float:
        """Return how long it takes to import a model pruned elsewhere."""

    def reading(self, unit: Unit, plan: ReadingPlan) -> float:
        """Return how long a unit of reading takes."""

    def answering(self, unit: Unit) -> float:
        """Return how long a task of the evaluation harness takes with one model."""

    def __str__(self) -> str:
        """Say what the times are based on."""


@dataclass(frozen=True)
class Trial:
    """Times from short trials with the model on this machine; the model is loaded, and that is timed, too."""

    context: Context
    trial = True

    def loading(self) -> float:
        """See :class:`Pace`."""
        assert self.context.model.session
        return self.context.model.seconds_to_load

    def wave(self, cost: WaveCost) -> float:
        """See :class:`Pace`."""
        return cost.seconds

    def importing(self) -> float:
        """See :class:`Pace`."""
        return _IMPORT * self.loading()

    def reading(self, unit: Unit, plan: ReadingPlan) -> float:
        """See :class:`Pace`."""
        return plan.seconds

    def answering(self, unit: Unit) -> float:
        """See :class:`Pace`."""
        return unit.work * self._seconds_a_product

    @cached_property
    def _seconds_a_product(self) -> float:
        """Time of one multiply-add of a forward pass, from a trial with a little text."""
        context = self.context
        stream = FittingStream(context.model.session, next(iter(context.texts.fitting.values())))
        plan = plan_reading(context.model.session, [stream], memory=context.memory, device_memory=context.device_memory)
        return plan.seconds / (plan.tokens * context.model.facts.body)

    def __str__(self) -> str:
        """See :class:`Pace`."""
        facts = self.context.model.facts
        threads = torch.get_num_threads()
        on = f"its CPU with {threads} thread{'s' * (threads > 1)}" if facts.device == "cpu" else facts.device
        return f"Times are from trials with a batch of text on this machine, on {on}"


@dataclass(frozen=True)
class Figures:
    """Times from figures for a machine; nothing is run.

    Attributes
    ----------
    tflops
        Effective speed: 10¹² floating-point operations a second in forward passes, two to a multiply-add.
    bandwidth
        10⁹ bytes a second at which weights reach the device from disk, and variants are written.
    """

    tflops: float
    bandwidth: float

    @classmethod
    def given(cls, tflops: float | None, bandwidth: float | None) -> Figures | None:
        """Return figures from options of the command line; ``None`` if there are none.

        Raises
        ------
        StudyError
            If one of them is missing, or is not above zero.
        """
        if tflops is None and bandwidth is None:
            return None
        if tflops is None or bandwidth is None:
            lacking = "--tflops" if tflops is None else "--bandwidth"
            raise StudyError(
                f"{lacking} is missing: times from figures need both, such as --tflops 100 --bandwidth 2; without "
                "them, a batch of text is timed on this machine"
            )
        for name, value in (("--tflops", tflops), ("--bandwidth", bandwidth)):
            if not 0 < value < float("inf"):
                raise StudyError(f"{name} {value:g} must be a number above zero")
        return cls(tflops, bandwidth)

    def of(self, context: Context) -> FromFigures:
        """Return the times of a study."""
        return FromFigures(self, context)


@dataclass(frozen=True)
class FromFigures:
    """Times of one study from figures."""

    figures: Figures
    context: Context
    _sizes: dict[str, int] = field(default_factory=dict)
    trial = False

    def loading(self) -> float:
        """See :class:`Pace`; nothing of a model whose weights stay on disk, since every unit reads them."""
        model = self.context.model
        return 0.0 if model.anatomy.streamed else self._moved(model.weight_bytes)

    def wave(self, cost: WaveCost) -> float:
        """See :class:`Pace`."""
        return self._computed(cost.tokens * self.context.model.facts.body) + self._moved(self._streamed + cost.kept)

    def importing(self) -> float:
        """See :class:`Pace`."""
        return _IMPORT * self._moved(self.context.model.weight_bytes)

    def reading(self, unit: Unit, plan: ReadingPlan) -> float:
        """See :class:`Pace`; each pass over the blocks applies every variant to every block."""
        models = dict.fromkeys(output.name.split("/")[1] for output in unit.outputs)
        moved = plan.waves * (self._streamed + sum(map(self._variant, models)))
        return self._computed(unit.work * READERS) + self._moved(moved)

    def answering(self, unit: Unit) -> float:
        """See :class:`Pace`."""
        return self._computed(unit.work)

    @property
    def _streamed(self) -> int:
        """Bytes of weights that are read in a pass over the blocks."""
        model = self.context.model
        return model.weight_bytes if model.anatomy.streamed else 0

    def _variant(self, name: str) -> int:
        """Return the bytes of what is stored of a model beside the dense one."""
        variants, model = self.context.variants, self.context.model
        if name not in self._sizes:
            job = variants.jobs.get(name)
            changed = model.weight_bytes if name in variants.imports.found else 0
            self._sizes[name] = variant_bytes(model.anatomy, job.recipe) if job else changed
        return self._sizes[name]

    def _computed(self, products: float) -> float:
        return 2 * products / (self.figures.tflops * 1e12)

    def _moved(self, size: int) -> float:
        return size / (self.figures.bandwidth * 1e9)

    def __str__(self) -> str:
        """See :class:`Pace`."""
        figures = self.figures
        return (
            f"Times are from the figures given, {figures.tflops:g} effective TFLOPS and {figures.bandwidth:g} GB/s of "
            "weights for each worker; what choosing and solving add to the passes of text is as measured on a CPU"
        )
