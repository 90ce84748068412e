"""The stage that finds the components responsible for a variant's drop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from probes import DENSE, ChoiceScores
from probes.patching import DAMAGE, RESTORE, Component, Direction, Patched, attribute, patch
from probes.scoring import Question
from pruning.code_version import code_version
from pruning.errors import PrunescopeError, StudyError
from pruning.files import content_sha256, whole_file, write_text
from pruning.projections import Key
from pruning.remedy import REMEDY_FILE

from ..frames import ALL, write_frame
from ..metrics.components import AT_TOKENS
from ..metrics.controls import DRAWS
from ..metrics.halves import HALVES, OTHER
from ..metrics.recovery import ADDED, CONFIRMED, SAMPLED, Confirmation, collect, to_confirm
from ..metrics.together import DRAWS as TOGETHER_DRAWS
from .context import Context
from .crossings import CROSSING, Crossings
from .diagnosis_inputs import DiagnosisInputs
from .diagnosis_request import DiagnosisRequest, check
from .frames import StudyMeasured
from .read import fitting_key, questions_key, readings_key
from .units import Advance, Output, Unit

FOLDER = "diagnoses"
REQUEST_FILE = "diagnosis.json"
_PARTS = "parts"
_ATTRIBUTED = "attribution"
_TOGETHER = "together"
#: Components patched per unit; each unit has an overhead of two passes.
_COMPONENTS = 32
#: Cost of attribution in forward passes: the dense run, and one with gradients.
_ATTRIBUTION = 4
#: Curves that are patched exactly after each block; and those of minimal pairs, at each class of tokens.
_CURVES, _CURVES_OF_PAIRS = 3, len(AT_TOKENS)
#: What does not tell diagnoses apart that are compared across languages.
_LEFT_OUT = {"language": ALL, "confirm": CONFIRMED, "sample": SAMPLED, "sources": ()}
_DIRECTIONS: tuple[Direction, ...] = (RESTORE, DAMAGE)


class Diagnose:
    """A unit is the attribution of all components on one half, the exact patching of some, or collecting the results.

    Parameters
    ----------
    requests
        What to diagnose.
    """

    name = "diagnose"

    def __init__(self, *requests: DiagnosisRequest) -> None:
        self.requests = requests
        self._unfinished: dict[DiagnosisRequest, Diagnosis] = {}  # their components take long to make

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the units that can run now; attribution comes first, since it selects the components to patch exactly.

        The work of the attribution unit includes the estimated work of the units that follow.
        """
        return [unit for request in self.requests for unit in self._units_of(context, request)]

    def _units_of(self, context: Context, request: DiagnosisRequest) -> Sequence[Unit]:
        diagnosis = self._diagnosis(context, request)
        done = context.records.finished
        if done(diagnosis.result, diagnosis.key):
            del self._unfinished[request]
            return []
        if request.variant in context.variants.set_aside:
            reason = context.variants.set_aside[request.variant]
            raise StudyError(f"{request.variant} could not be made, so it cannot be diagnosed: {reason}")
        title = f"diagnosing {request.variant} ({request.category} in {request.language})"
        attributions = [diagnosis.part(f"{_ATTRIBUTED}/{half}") for half in HALVES]
        left = [output for output in attributions if not done(output.name, output.key)]
        if left:
            blocks = context.model.facts.blocks
            curves = _CURVES + (_CURVES_OF_PAIRS if diagnosis.pairs else 0)
            later = curves * blocks + 4 * (request.confirm + 2 * ADDED) + 3 * request.sample + 4 * DRAWS
            later += (1 + TOGETHER_DRAWS) * len(diagnosis.projections).bit_length()
            return [
                self._unit(f"{title}: attribution", [output], diagnosis.work((_ATTRIBUTION + later) // 2))
                for output in left
            ]
        found = []
        for output in (one for one in diagnosis.crossings() if not done(one.name, one.key)):
            _, model, source = output.name.rsplit("/", 2)
            words = f"{title}: states of {source}, {model} model" if model == DENSE else f"{title}: states of {source}"
            found.append(self._unit(words, [output], diagnosis.work(2 + context.model.facts.blocks)))
        parts = {f"{direction}, %s components": (outputs, 1.0) for direction, outputs in diagnosis.patched().items()}
        for half, outputs in diagnosis.together().items():
            parts[f"masks together, as chosen on the {half} half, %s sets"] = outputs, 0.5
        for words, (outputs, share) in parts.items():
            left = [output for output in outputs if not done(output.name, output.key)]
            for start in range(0, len(left), _COMPONENTS):
                some = left[start : start + _COMPONENTS]
                title_here = f"{title}: {words % f'{len(some)} of {len(outputs)}'}"
                found.append(self._unit(title_here, some, share * diagnosis.work(2 + len(some))))
        return found or [self._unit(f"{title}: results", [Output(diagnosis.result, diagnosis.key)], 0.0)]

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Run one unit of the diagnosis, and record its results."""
        began = time.monotonic()
        several = (self._diagnosis(context, request) for request in self.requests)
        own = unit.outputs[0].name
        diagnosis = next(one for one in several if own == one.result or own.startswith(f"{one.result}/"))
        body = context.model.facts.body
        files: dict[str, list[Path]]
        if unit.outputs[0].name == diagnosis.result:
            files = {diagnosis.result: diagnosis.put_together()}
        elif f"/{_ATTRIBUTED}/" in unit.outputs[0].name:
            half = unit.outputs[0].name.rpartition("/")[2]
            files = {unit.outputs[0].name: [diagnosis.attribute(half, lambda tokens: advance(tokens * body))]}
        elif diagnosis.of_crossing(own):
            files = {own: [diagnosis.cross(own, lambda tokens: advance(tokens * body))]}
        else:
            names = [output.name for output in unit.outputs]
            patch = diagnosis.undo if f"/{_TOGETHER}/" in names[0] else diagnosis.patch
            files = {name: [path] for name, path in patch(names, lambda tokens: advance(tokens * body))}
        seconds = (time.monotonic() - began) / len(unit.outputs)
        for output in unit.outputs:
            context.records.finish(output.name, output.key, files[output.name], seconds)

    def _diagnosis(self, context: Context, request: DiagnosisRequest) -> Diagnosis:
        if request not in self._unfinished:
            self._unfinished[request] = Diagnosis(context, request)
        return self._unfinished[request]

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

    @property
    def crossing(self) -> Path:
        """Path of the frame ``crossing``, which is there if states of other languages were asked for."""
        return self.folder / "crossing.parquet"

    @cached_property
    def key(self) -> str:
        """Hash of everything that the diagnosis depends on."""
        return content_sha256([self._base, self.request.model_dump(mode="json"), self._crossings.keys])

    def part(self, name: str) -> Output:
        """Return one part as a separate result; it does not depend on how many causes are confirmed."""
        return Output(f"{self.result}/{name}", content_sha256([self._base, name]))

    def patched(self) -> dict[Direction, list[Output]]:
        """Return the results of exact patching to compute, given the attribution."""
        return {
            direction: [self.part(f"{direction}/{_slug(self._inputs.components[i])}") for i in indices]
            for direction, indices in self._plan.exact.items()
        }

    def together(self) -> dict[str, list[Output]]:
        """Return the results of undoing masks together, given the attribution, by the half that chose them."""
        return {
            half: [self.part(f"{_TOGETHER}/{half}/{one.name}") for one in sets]
            for half, sets in self._plan.together.items()
        }

    def crossings(self) -> list[Output]:
        """Return the results with states of other languages, of the dense model and the variant."""
        return [Output(f"{self.result}/{name}", key) for name, key in self._crossings.keys.items()]

    def of_crossing(self, name: str) -> bool:
        """Return whether a result is one with states of another language."""
        return name.removeprefix(f"{self.result}/").partition("/")[0] == CROSSING

    def cross(self, name: str, progress: Advance) -> Path:
        """Compute one result with states of another language, and return its file."""
        part = name.removeprefix(f"{self.result}/")
        return self._crossings.compute(part, self._file(part), progress)

    @property
    def projections(self) -> tuple[Key, ...]:
        """The projections that were pruned."""
        return self._inputs.variant.projections

    @property
    def pairs(self) -> int:
        """How many questions are items of minimal pairs."""
        return self._inputs.pairs

    def work(self, passes: int) -> float:
        """Return the multiply-adds of `passes` passes over the questions."""
        return (
            passes * sum(question.tokens for question in self._inputs.asked.questions) * self.context.model.facts.body
        )

    def attribute(self, half: str, progress: Advance) -> Path:
        """Estimate what every component recovers on one half of the questions, and return the file."""
        found = attribute(
            self.context.model.session,
            self._inputs.asked.half(half),
            self._inputs.damage,
            self._inputs.components,
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
            for i, component in enumerate(self._inputs.components)
        }
        (direction,) = {places[name][0] for name in names}
        chosen = [self._inputs.components[places[name][1]] for name in names]
        yield from self._patch(names, self._inputs.asked.questions, chosen, direction, progress)

    def undo(self, names: Sequence[str], progress: Advance) -> Iterator[tuple[str, Path]]:
        """Undo some sets of masks that one half chose, on the other half; yield the name and file of each result."""
        plan = self._plan.together
        places = {f"{self.result}/{_TOGETHER}/{half}/{s.name}": (half, s) for half, sets in plan.items() for s in sets}
        (half,) = {places[name][0] for name in names}
        chosen = [places[name][1].component for name in names]
        yield from self._patch(names, self._inputs.asked.half(OTHER[half]), chosen, RESTORE, progress)

    def _patch(
        self,
        names: Sequence[str],
        questions: Sequence[Question],
        components: Sequence[Component],
        direction: Direction,
        progress: Advance,
    ) -> Iterator[tuple[str, Path]]:
        found = patch(
            self.context.model.session,
            questions,
            self._inputs.damage,
            components,
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
        asked, components, variant = self._inputs.asked, self._inputs.components, self._inputs.variant
        estimates = self._attributed()
        plan = self._plan
        exact = {
            direction: {i: ChoiceScores.open(self._file(f"{direction}/{_slug(components[i])}")) for i in indices}
            for direction, indices in plan.exact.items()
        }
        together = {
            half: {one.name: ChoiceScores.open(self._file(f"{_TOGETHER}/{half}/{one.name}")) for one in sets}
            for half, sets in plan.together.items()
        }
        weights = {key: self._inputs.damage.numel(key) for key in variant.projections}
        frame = collect(
            asked, components, variant.columns(), estimates, exact, plan, together, weights, self._inputs.errors
        )
        files = [write_frame(self.folder, "recovery", frame), self.write_request()]
        self.crossing.unlink(missing_ok=True)  # it may belong to an earlier request
        if self.request.sources:
            parts = {name: self._file(name) for name in self._crossings.keys}
            files.append(write_frame(self.folder, "crossing", self._crossings.frame(parts)))
        (self.folder / REMEDY_FILE).unlink(missing_ok=True)  # it may belong to an earlier version of this variant
        remedy = self._inputs.remedy(frame)
        if remedy is not None:
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
    def _crossings(self) -> Crossings:
        return Crossings(self.context, self.request, lambda: self._inputs, self._base)

    @cached_property
    def _inputs(self) -> DiagnosisInputs:
        return DiagnosisInputs(StudyMeasured(self.context), self.context.model.session, self.request)

    @cached_property
    def _plan(self) -> Confirmation:
        """What is to be patched exactly; the attribution must be finished."""
        request, inputs = self.request, self._inputs
        return to_confirm(inputs.asked, inputs.components, self._attributed(), request.confirm, request.sample)

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


def across_languages(context: Context) -> Iterator[tuple[DiagnosisRequest, dict[str, Diagnosis]]]:
    """Yield the finished diagnoses that differ in language alone: the request for all languages, and each diagnosis."""
    groups: dict[DiagnosisRequest, dict[str, Diagnosis]] = {}
    for diagnosis in diagnoses(context):
        request = diagnosis.request.model_copy(update=_LEFT_OUT)
        groups.setdefault(request, {})[diagnosis.request.language] = diagnosis
    yield from ((request, group) for request, group in groups.items() if len(group) > 1)


def _slug(component: Component) -> str:
    return component.label.replace(" ", "-")
