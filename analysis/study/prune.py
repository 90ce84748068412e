"""The first stage: makes the pruned variants, wave by wave, and imports models pruned elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pruning import Variant
from pruning.engine.plan import WaveCost
from pruning.errors import VariantError
from pruning.models.loading import load_weights
from pruning.runner import Wave
from pruning.variants.store import RECIPE_FILE

from .context import Context
from .units import Advance, Output, Unit
from .variants import record_of


class Prune:
    """A unit is a wave of variants, or one model pruned elsewhere."""

    name = "prune"

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the models to import, then the waves."""
        variants = context.variants
        pending = [name for name in variants.keys if not variants.finished(name)]
        return [*self._imports(context, pending), *self._waves(context, pending)]

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Make the variants of a unit, and record each."""
        names = [output.name.partition("/")[2] for output in unit.outputs]
        if names[0] in context.variants.imports.found:
            _take_over(context, names[0])
        else:
            _make(context, names, advance)

    def cost(self, context: Context, unit: Unit) -> WaveCost | None:
        """Return what a wave will need; ``None`` of any other unit."""
        names = [output.name.partition("/")[2] for output in unit.outputs]
        plan = context.variants.pruning.plan if names[0] in context.variants.jobs else None
        waves = zip(plan.waves, plan.costs, strict=True) if plan else ()
        return next((cost for wave, cost in waves if [job.id for job in wave] == names), None)

    def _imports(self, context: Context, pending: Sequence[str]) -> Iterator[Unit]:
        for name in pending:
            if name in context.variants.imports.found:
                yield self._unit(context, f"importing {name}", [name])

    def _waves(self, context: Context, pending: Sequence[str]) -> Iterator[Unit]:
        left = [name for name in pending if name in context.variants.jobs]
        if not left:
            return
        run = context.variants.pruning
        waves = [wave for wave in run.waves if any(job.id in left for job in wave.jobs)]
        in_waves = {job.id for wave in waves for job in wave.jobs}
        whole = [name for name in left if name not in in_waves]  # a killed run made these without recording them
        if whole:
            yield self._unit(context, "recording variants that already exist", whole)
        for number, wave in enumerate(waves, start=1):
            title = f"pruning {wave}" + (f" (wave {number} of {len(waves)})" if len(waves) > 1 else "")
            yield self._unit(context, title, [job.id for job in wave.jobs], wave)

    def _unit(self, context: Context, title: str, names: Sequence[str], wave: Wave | None = None) -> Unit:
        outputs = tuple(Output(record_of(name), context.variants.keys[name]) for name in names)
        plan = context.variants.pruning.plan if wave else None
        work = wave.tokens * _block_work(context) if wave else 0.0
        return Unit(self.name, title, outputs, work, plan.memory if plan else 0)


def _make(context: Context, names: Sequence[str], advance: Advance) -> None:
    variants = context.variants
    run = variants.pruning
    began = time.monotonic()
    if not all(run.finished(name) or name in run.set_aside for name in names):
        weights = _block_work(context)
        run.run(run.wave(names), lambda tokens: advance(tokens * weights))
    seconds = (time.monotonic() - began) / len(names)
    for name in names:
        if name in run.set_aside:
            _record(context, name, seconds, {"set_aside": run.set_aside[name]})
        else:
            _record(context, name, seconds)
    if not run.pending:
        run.close()


def _record(context: Context, name: str, seconds: float, facts: dict[str, Any] | None = None) -> None:
    files = [] if facts else sorted(path for path in context.variants.place(name).iterdir() if path.is_file())
    context.records.finish(record_of(name), context.variants.keys[name], files, seconds, facts)


def _block_work(context: Context) -> float:
    return context.model.facts.body / context.model.facts.blocks


def _take_over(context: Context, name: str) -> None:
    """Import a model pruned elsewhere, or a variant that was made before, as a variant."""
    began = time.monotonic()
    study, anatomy = context.study, context.model.anatomy
    imports = context.variants.imports
    checkpoint, _ = imports.found[name]
    place = context.variants.place(name)
    if imports.made_here(name):
        made = Variant.open(imports.folder(name))
        made.check_belongs_to(context.model.facts.fingerprint)
        made = replace(made, record=made.record.model_copy(update={"id": name}))
        made.save(place)
        _keep(context, made, began)
        return
    folder = str(imports.folder(name))
    pruned = load_weights(folder, dtype=study.dtype, device=study.device, stream=anatomy.streamed)
    try:
        variant = Variant.between(anatomy.model, pruned, name, place)
    except VariantError as error:
        if not _imported_others(context, checkpoint.collection):
            raise VariantError(f"{checkpoint.source}: {error}") from error
        _record(context, name, time.monotonic() - began, {"set_aside": str(error)})
        return
    if checkpoint.collection:
        variant = variant.described(checkpoint.stated)
    _keep(context, variant, began)


def _keep(context: Context, variant: Variant, began: float) -> None:
    """Record an imported variant that is in its place already, unless frames could not tell it from another one."""
    place = context.variants.place(variant.id)
    variant = replace(variant, record=variant.record.model_copy(update={"model": context.study.model_name}))
    try:
        _check_unlike_others(context, variant)
    except VariantError:
        shutil.rmtree(place)
        raise
    variant.record.save(place)
    if variant.record.found:
        context.tell(f"{variant.id}: {variant.record.found}")
    _record(context, variant.id, time.monotonic() - began)


def _imported_others(context: Context, collection: str) -> bool:
    """Whether another checkpoint of a collection was imported: if not even one fits, it is of another dense model."""
    variants = context.variants
    return bool(collection) and any(
        variants.finished(name) and name in variants.names
        for name, (own, _) in variants.imports.found.items()
        if own.collection == collection
    )


def _check_unlike_others(context: Context, variant: Variant) -> None:
    """Raise ``VariantError`` if frames could not distinguish an imported variant from another one."""
    columns = variant.columns()
    run = context.variants.pruning
    sparsity, size = float(columns["sparsity"]), float(columns["bits"])
    for name, job in context.variants.jobs.items():
        if run.record(job).columns(sparsity, size) == columns:
            raise VariantError(
                f'imported "{variant.id}" has the same recipe as "{name}", which this study makes itself; '
                f"leave one of them out, or remove the {RECIPE_FILE} next to that checkpoint"
            )
    for name in context.variants.imports.found:
        if name != variant.id and context.variants.finished(name) and context.variants.open(name).columns() == columns:
            raise VariantError(
                f'imported "{variant.id}" and "{name}" have the same recipe; '
                f"leave one of them out, or remove the {RECIPE_FILE} next to its checkpoint"
            )
