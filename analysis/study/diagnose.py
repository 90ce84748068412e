"""The stage that finds the components responsible for a variant's drop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from probes import DENSE, ChoiceScores, DamagedModel, Readings, item_questions, text_questions
from probes.patching import DAMAGE, RESTORE, Component, Direction, Patched, attribute, patch
from pruning import Remedy, Variant
from pruning.code_version import code_version
from pruning.errors import PrunescopeError, StudyError
from pruning.files import content_sha256, whole_file, write_text
from pruning.remedy import REMEDY_FILE

from ..frames import TEXT, write_frame
from ..metrics import firing
from ..metrics.controls import DRAWS
from ..metrics.halves import HALVES, item_strata
from ..metrics.recovery import ADDED, Asked, Confirmation, collect, components_of, importance, to_confirm
from .context import Context
from .diagnosis_request import DiagnosisRequest, asked_items, asked_segments, check
from .read import fitting_key, questions_key, readings_file, readings_key, stored_readings, subspaces
from .units import Advance, Output, Unit

FOLDER = "diagnoses"
REQUEST_FILE = "diagnosis.json"
_PARTS = "parts"
_ATTRIBUTED = "attribution"
#: Components patched per unit; each unit has an overhead of two passes.
_COMPONENTS = 32
#: Cost of attribution in forward passes: the dense run, and one with gradients.
_ATTRIBUTION = 4
#: Curves that are patched exactly after each block.
_CURVES = 3
_HALVES_IN_WORDS = {
    "all": "all templates",
    "first": "the first half of the templates",
    "second": "the second half of the templates",
}
_DIRECTIONS: tuple[Direction, ...] = (RESTORE, DAMAGE)


class Diagnose:
    """A unit is the attribution of all components on one half, the exact patching of some, or collecting the results.

    Parameters
    ----------
    request
        What to diagnose.
    """

    name = "diagnose"

    def __init__(self, request: DiagnosisRequest) -> None:
        self.request = request

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the units that can run now; attribution comes first, since it selects the components to patch exactly.

        The work of the attribution unit includes the estimated work of the units that follow.
        """
        diagnosis = Diagnosis(context, self.request)
        done = context.records.finished
        if done(diagnosis.result, diagnosis.key):
            return []
        if self.request.variant in context.variants.set_aside:
            reason = context.variants.set_aside[self.request.variant]
            raise StudyError(f"{self.request.variant} could not be made, so it cannot be diagnosed: {reason}")
        title = f"diagnosing {self.request.variant} ({self.request.category} in {self.request.language})"
        attributions = [diagnosis.part(f"{_ATTRIBUTED}/{half}") for half in HALVES]
        left = [output for output in attributions if not done(output.name, output.key)]
        if left:
            blocks, request = context.model.facts.blocks, self.request
            later = _CURVES * blocks + 4 * (request.confirm + 2 * ADDED) + 2 * request.sample + 4 * DRAWS
            return [
                self._unit(f"{title}: attribution", [output], diagnosis.work((_ATTRIBUTION + later) // 2))
                for output in left
            ]
        found = []
        for direction, outputs in diagnosis.patched().items():
            left = [output for output in outputs if not done(output.name, output.key)]
            for start in range(0, len(left), _COMPONENTS):
                some = left[start : start + _COMPONENTS]
                title_here = f"{title}: {direction}, {len(some)} of {len(outputs)} components"
                found.append(self._unit(title_here, some, diagnosis.work(2 + len(some))))
        return found or [self._unit(f"{title}: results", [Output(diagnosis.result, diagnosis.key)], 0.0)]

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Run one unit of the diagnosis, and record its results."""
        began = time.monotonic()
        diagnosis = Diagnosis(context, self.request)
        body = context.model.facts.body
        files: dict[str, list[Path]]
        if unit.outputs[0].name == diagnosis.result:
            files = {diagnosis.result: diagnosis.put_together()}
        elif f"/{_ATTRIBUTED}/" in unit.outputs[0].name:
            half = unit.outputs[0].name.rpartition("/")[2]
            files = {unit.outputs[0].name: [diagnosis.attribute(half, lambda tokens: advance(tokens * body))]}
        else:
            names = [output.name for output in unit.outputs]
            files = {name: [path] for name, path in diagnosis.patch(names, lambda tokens: advance(tokens * body))}
        seconds = (time.monotonic() - began) / len(unit.outputs)
        for output in unit.outputs:
            context.records.finish(output.name, output.key, files[output.name], seconds)

    def _unit(self, title: str, outputs: Sequence[Output], work: float) -> Unit:
        return Unit(self.name, title, tuple(outputs), work)


class Diagnosis:
    """One diagnosis of a study: its parts, their keys and their files.

    Parameters
    ----------
    context
        Context of the study.
    request
        The request, already checked.
    """

    def __init__(self, context: Context, request: DiagnosisRequest) -> None:
        self.context = context
        self.request = request
        self.folder = context.folder / FOLDER / request.name
        self.result = f"{FOLDER}/{request.name}"

    @property
    def frame(self) -> Path:
        """Path of the frame ``recovery``."""
        return self.folder / "recovery.parquet"

    @cached_property
    def key(self) -> str:
        """Hash of everything that the diagnosis depends on."""
        return content_sha256([self._base, self.request.model_dump(mode="json")])

    def part(self, name: str) -> Output:
        """Return one part as a separate result; it does not depend on how many causes are confirmed."""
        return Output(f"{self.result}/{name}", content_sha256([self._base, name]))

    def patched(self) -> dict[Direction, list[Output]]:
        """Return the results of exact patching to compute, given the attribution."""
        return {
            direction: [self.part(f"{direction}/{_slug(self._components[i])}") for i in indices]
            for direction, indices in self._plan(self._attributed()).exact.items()
        }

    def work(self, passes: int) -> float:
        """Return the multiply-adds of `passes` passes over the questions."""
        return passes * sum(question.tokens for question in self._asked.questions) * self.context.model.facts.body

    def attribute(self, half: str, progress: Advance) -> Path:
        """Estimate what every component recovers on one half of the questions, and return the file."""
        found = attribute(
            self.context.model.session,
            self._asked.half(half),
            self._damage,
            self._components,
            positions=self.request.positions,
            progress=progress,
        )
        tensors = {f"attributed/{i}": torch.from_numpy(values) for i, values in found.attributed.items()}
        tensors["answers"] = torch.from_numpy(found.dense.answers)
        tensors |= {"dense": torch.from_numpy(found.dense.values), "pruned": torch.from_numpy(found.pruned.values)}
        path = self._file(f"{_ATTRIBUTED}/{half}")
        with whole_file(path) as partial:
            save_file(tensors, partial)
        return path

    def patch(self, names: Sequence[str], progress: Advance) -> Iterator[tuple[str, Path]]:
        """Patch some components exactly, in one direction; yield the name and file of each result."""
        places = {
            f"{self.result}/{direction}/{_slug(component)}": (direction, i)
            for direction in _DIRECTIONS
            for i, component in enumerate(self._components)
        }
        (direction,) = {places[name][0] for name in names}
        chosen = [self._components[places[name][1]] for name in names]
        found = patch(
            self.context.model.session,
            self._asked.questions,
            self._damage,
            chosen,
            direction=direction,
            positions=self.request.positions,
            progress=progress,
        )
        for i, name in enumerate(names):
            path = self._file(name.removeprefix(f"{self.result}/"))
            found.exact[i].save(path)
            yield name, path

    def write_request(self) -> Path:
        """Write the request, unless it is already on disk, and return the file."""
        path, text = self.folder / REQUEST_FILE, self.request.model_dump_json(indent=2) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        return path

    def put_together(self) -> list[Path]:
        """Write the frame and the remedy, and return all files."""
        asked, components, variant = self._asked, self._components, self._variant
        estimates = self._attributed()
        plan = self._plan(estimates)
        exact = {
            direction: {i: ChoiceScores.open(self._file(f"{direction}/{_slug(components[i])}")) for i in indices}
            for direction, indices in plan.exact.items()
        }
        frame = collect(asked, components, variant.columns(), estimates, exact, plan, self._errors)
        files = [write_frame(self.folder, "recovery", frame), self.write_request()]
        (self.folder / REMEDY_FILE).unlink(missing_ok=True)  # it may belong to an earlier version of this variant
        found = importance(frame)
        if found:
            request = self.request
            remedy = Remedy(
                model_fingerprint=self.context.model.facts.fingerprint,
                variant=request.variant,
                language=request.language,
                category=request.category,
                fitted_on=f"{len(asked.questions)} {request.category} questions ({_HALVES_IN_WORDS[request.half]})",
                importance=found,
            )
            remedy.save(self.folder / REMEDY_FILE)
            files.append(self.folder / REMEDY_FILE)
        return files

    # -- inputs -------------------------------------------------------------------------------------------------

    @cached_property
    def _base(self) -> str:
        context, request = self.context, self.request
        language = request.language
        code = code_version("pruning", "probes", "analysis.metrics", "analysis.stats", "analysis.frames")
        asked = questions_key(context, request.variant, language) if language in context.texts.items else ""
        read = [readings_key(context, DENSE, lang) for lang in context.study.languages]
        fitted = [fitting_key(context, lang) for lang in context.study.languages]
        own = readings_key(context, request.variant, language)
        what = [request.variant, language, request.category, request.half, request.positions]
        return content_sha256([code, own, read, fitted, asked, what, context.study.evaluation.rank])

    @cached_property
    def _asked(self) -> Asked:
        session, texts, request = self.context.model.session, self.context.texts, self.request
        if request.category == TEXT:
            segments = asked_segments(texts.heldout[request.language], request)
            questions = text_questions(session, segments)
            return Asked(TEXT, TEXT, request.language, questions, [segment.id for segment in segments])
        items = asked_items(texts.items[request.language], request)
        questions = item_questions(session, items)
        templates = [item.template for item in items]
        return Asked(texts.task, request.category, request.language, questions, templates, item_strata(items))

    @cached_property
    def _variant(self) -> Variant:
        return self.context.variants.open(self.request.variant)

    @cached_property
    def _damage(self) -> DamagedModel:
        return DamagedModel(self.context.model.session.owner, self._variant)

    @cached_property
    def _components(self) -> list[Component]:
        neurons, rates = self._language_neurons()
        return components_of(
            self.context.model.anatomy,
            self._variant.projections,
            subspaces(self.context),
            neurons,
            errors=self._errors,
            rates=rates,
        )

    @cached_property
    def _errors(self) -> list[np.ndarray]:
        """What pruning changes in the mean states of held-out segments after each block."""
        language = self.request.language
        dense, pruned = (
            Readings.open(readings_file(self.context, model, language)) for model in (DENSE, self.request.variant)
        )
        return [(own - other).numpy() for own, other in zip(dense.pooled, pruned.pooled, strict=True)]

    def _language_neurons(self) -> tuple[dict[int, list[int]], np.ndarray | None]:
        """Return the dense model's neurons that are specific to the language (LAPE), by block, and all firing rates.

        None in a mixture of experts: what is patched there is all that an expert adds.
        """
        counts = firing.FiringCounts.of(stored_readings(self.context, [DENSE]), DENSE)
        probabilities = counts.probabilities()
        if not probabilities.size or counts.owner is not None:
            return {}, None
        language = counts.languages.index(self.request.language)
        members = firing.select(probabilities).members[..., language]
        return {layer: np.flatnonzero(own).tolist() for layer, own in enumerate(members)}, probabilities[..., language]

    def _plan(self, estimates: Mapping[str, Patched]) -> Confirmation:
        return to_confirm(self._asked, self._components, estimates, self.request.confirm, self.request.sample)

    def _attributed(self) -> dict[str, Patched]:
        return {half: self._attributed_on(half) for half in HALVES}

    def _attributed_on(self, half: str) -> Patched:
        tensors = {name: tensor.numpy() for name, tensor in load_file(self._file(f"{_ATTRIBUTED}/{half}")).items()}
        answers = tensors.pop("answers")
        dense, pruned = ChoiceScores(tensors.pop("dense"), answers), ChoiceScores(tensors.pop("pruned"), answers)
        return Patched(dense, pruned, attributed={int(n.partition("/")[2]): values for n, values in tensors.items()})

    def _file(self, part: str) -> Path:
        return self.folder / _PARTS / f"{part}.safetensors"


def diagnoses(context: Context) -> Iterator[Diagnosis]:
    """Yield the finished diagnoses in a study's folder that match its current variants."""
    for path in sorted((context.folder / FOLDER).glob(f"*/{REQUEST_FILE}")):
        try:
            request = DiagnosisRequest.model_validate(json.loads(path.read_text(encoding="utf-8")))
            request = check(context.study, request)
        except (ValueError, PrunescopeError):  # damaged, or of a variant that the study no longer has
            continue
        diagnosis = Diagnosis(context, request)
        if request.variant not in context.variants.set_aside and context.records.finished(
            diagnosis.result, diagnosis.key
        ):
            yield diagnosis


def _slug(component: Component) -> str:
    return component.label.replace(" ", "-")
