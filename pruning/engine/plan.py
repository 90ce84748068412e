"""Estimates of what a grid of jobs will need: host and device memory, disk space and time."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from humanize import naturaldelta, naturalsize

from ..allocation import allocation_named
from ..correction import NONE, corrector_named
from ..errors import RecipeError
from ..methods import magnitude
from ..models.anatomy import Anatomy
from ..models.head import head_of
from ..patterns import MODEL, Shape, pattern_named
from ..projections import Key
from ..quantization import SCALE_BITS
from ..recipes import Recipe
from ..spectrum import squared_singular_values, tail_exponent
from ..statistics import CURVATURE, GRAM
from ..text.calibration import CalibrationText
from ..variants.masks import pack_bits
from .jobs import Job, Schedule, choices, covered_shapes, most_held
from .loss import GRADIENT_TOKENS
from .recovering import recovery_memory, recovery_tokens
from .shelves import Place
from .streams import StackStarter, Stream, run_block
from .sweep import differentiated_tokens, streaming, surveyed

#: Bytes that Python, torch, transformers and a tokenizer take before a model is loaded.
_BASE = 700 << 20
#: Bytes of device memory that its libraries take.
_CONTEXT = 500 << 20
#: Allocated memory relative to memory in use: the allocator leaves gaps.
_SLACK = 1.4
_FLOAT, _DOUBLE = 4, 8
#: Size of the matrix whose spectrum is timed.
_TRIAL = 256
_GIB = 1 << 30
#: Time of a sweep relative to its forward passes alone, without and with weight updates, on the embedded model.
_OVERHEAD = {False: 1.2, True: 1.8}


class MemoryCapError(RecipeError):
    """A memory cap is too small for the request."""


@dataclass(frozen=True)
class WaveCost:
    """What one wave will need.

    Attributes
    ----------
    memory, device_memory
        Estimated peak in bytes: of the host, and of the model's device if it has its own memory (else 0).
    scratch, kept
        Bytes on disk: temporary, and of the finished variants; 0 if nothing is written.
    tokens
        Tokens that pass through every block, with other work counted as additional tokens.
    seconds
        From a short trial; 0 without one.
    """

    memory: int
    device_memory: int
    scratch: int
    kept: int
    tokens: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a grid will need.

    Attributes
    ----------
    waves
        Groups of jobs that go through the model together, in order.
    states
        Where hidden states are stored between blocks.
    memory, device_memory
        Estimated peak in bytes: of the host, and of the model's device if it has its own memory (else 0).
    scratch, kept
        Bytes on disk: temporary, and of the finished variants.
    seconds_a_block
        Time per block with all its jobs, from a short trial; 0 if nothing is written.
    blocks
        Number of blocks of the model.
    costs
        What each wave will need.
    """

    waves: tuple[tuple[Job, ...], ...]
    states: Place
    memory: int
    scratch: int
    kept: int
    seconds_a_block: float
    blocks: int
    device_memory: int = 0
    costs: tuple[WaveCost, ...] = ()

    def __str__(self) -> str:
        """Return the plan in one line."""
        jobs = sum(len(wave) for wave in self.waves)
        parts = [f"{jobs} variant{'s' * (jobs != 1)}" + (f" in {len(self.waves)} waves" if len(self.waves) > 1 else "")]
        parts.append(f"memory about {_size(self.memory)}")
        parts += [f"device memory about {_size(self.device_memory)}"] if self.device_memory else []
        parts += {"host": ["hidden states in host memory"], "disk": ["hidden states on disk"]}.get(self.states, [])
        parts.append(f"disk {_size(self.kept)}" + (f" plus {_size(self.scratch)} temporary" if self.scratch else ""))
        if self.seconds_a_block:
            total = self.seconds_a_block * self.blocks
            parts.append(f"about {self.seconds_a_block:.1f} s per block, {naturaldelta(total)} in total")
        return "pruning plan: " + ", ".join(parts)


def make_plan(
    anatomy: Anatomy,
    jobs: Sequence[Job],
    text: CalibrationText | None,
    *,
    memory: int | None = None,
    device_memory: int | None = None,
    batch_tokens: int = 2048,
    begun: Sequence[tuple[Job, ...]] = (),
    in_folder: bool = True,
    trial: bool = True,
    there: Collection[Job] = (),
    parts: int = 1,
) -> Plan:
    """Estimate what jobs will need, and split them into waves that stay within the caps.

    Parameters
    ----------
    anatomy, jobs, text
        As for the sweep.
    memory, device_memory
        Caps in bytes on resident memory and on the memory of the model's device; none by default.
    batch_tokens
        Tokens per batch.
    begun
        Unfinished waves of a killed run. They are kept unless they exceed the caps.
    in_folder
        Whether variants and hidden states may go to disk. If not, all variants are made in one wave and held in memory.
    trial
        Whether to time a block in order to estimate the time; only if variants go to a folder.
    there
        Finished variants that jobs fine-tune, without choosing anew.
    parts
        How many waves several processes want at least; calibration sets stay whole, so that work is still shared.

    Raises
    ------
    MemoryCapError
        If even one job at a time, with hidden states on disk, exceeds the caps; or if there is a device cap but the
        device has no memory of its own.
    """
    needed = _Needs(anatomy, text, batch_tokens, in_folder=in_folder, there=there)
    if device_memory is not None and not needed.apart:
        raise MemoryCapError(
            f"this model runs on the {anatomy.device.type}, which has no memory of its own to cap; "
            "use --memory, or load the model onto a GPU"
        )
    caps = (memory, device_memory)
    places: list[Place] = ["device"]
    places += ["host"] if needed.apart else []
    places += ["disk"] if in_folder else []
    begun = [wave for wave in begun if _within(needed.peak(wave, places[-1]), caps)]
    groups = _groups([job for job in jobs if not any(job in wave for wave in begun)])
    if not in_folder:
        groups = [tuple(jobs)]
    elif parts > 1:
        groups = [part for group in groups for part in _by_set(group, parts)]
    counts = list(_halvings(max(map(len, groups), default=0))) if in_folder else [1]
    # First move hidden states elsewhere, then use more waves; the last attempt needs the least memory.
    for place, count in [*((place, 1) for place in places), *((places[-1], count) for count in counts[1:])]:
        waves = [*begun, *(part for group in groups for part in _cut(group, count))]
        peaks = [needed.peak(wave, place) for wave in waves]
        peak = (max(host for host, _ in peaks), max(device for _, device in peaks))
        if _within(peak, caps):
            break
    else:
        raise _cap_error(anatomy, jobs, peak, caps)
    seconds = needed.seconds(waves) if in_folder and jobs and trial else [0.0] * len(waves)
    costs = tuple(
        WaveCost(
            *most,
            needed.states(choices(wave, there)) + sum(map(needed.kept, wave)) if in_folder else 0,
            sum(map(needed.kept, wave)) if in_folder else 0,
            needed.tokens_a_block(wave) if text is not None and any(job.recipe.calibrated for job in wave) else 0.0,
            own,
        )
        for wave, most, own in zip(waves, peaks, seconds, strict=True)
    )
    return Plan(
        tuple(waves),
        place,
        peak[0],
        max(cost.scratch for cost in costs),
        sum(needed.kept(job) for job in jobs) if in_folder else 0,
        sum(seconds) / len(anatomy.blocks),
        len(anatomy.blocks),
        peak[1],
        costs,
    )


def variant_bytes(anatomy: Anatomy, recipe: Recipe) -> int:
    """Return the size of a finished variant on disk."""
    weights = _removable(anatomy, recipe)
    if recipe.quantizes:
        a_group = (SCALE_BITS + recipe.bits) / recipe.group if recipe.group else 0
        return int(weights * (recipe.bits + a_group) / 8)
    changed = recipe.updates or recipe.recovers
    values = weights * (1 - recipe.sparsity) * anatomy.element_size if changed else 0
    return int(weights / 8 + values)


def _removable(anatomy: Anatomy, recipe: Recipe) -> int:
    return sum(outputs * inputs for outputs, inputs in covered_shapes(anatomy, recipe).values())


def _kept(jobs: Sequence[Job]) -> int:
    """Return how many matrices as large as a Gram matrix are kept with it for the next recipe on the same set."""
    recipes = [job.recipe for job in jobs]
    factors = {
        (recipe.weighting, *(_value(recipe, name) for name in ("damping", "order")))
        for recipe in recipes
        if recipe.scoring.solve is not None or "damping" in recipe.scoring.parameters
    }
    corrected = [recipe for recipe in recipes if corrector_named(recipe.correction).correct is not None]
    inverses = {tuple(recipe.correction_parameters.items()) for recipe in corrected}
    weighted = {recipe.weighting for recipe in recipes} - {None}
    return len(factors) + len(inverses) + len(weighted)


def _value(recipe: Recipe, parameter: str) -> float:
    """Return a parameter's value; 0 if the method does not have it."""
    known = recipe.scoring.parameters.get(parameter)
    return float(recipe.method_parameters.get(parameter, known.default if known else 0))


def _within(peak: tuple[int, int], caps: tuple[int | None, int | None]) -> bool:
    return all(cap is None or most <= cap for most, cap in zip(peak, caps, strict=True))


def _cap_error(
    anatomy: Anatomy, jobs: Sequence[Job], peak: tuple[int, int], caps: tuple[int | None, int | None]
) -> MemoryCapError:
    whole = [job.recipe.method for job in jobs if job.recipe.scoring.differentiates]
    hint = "" if anatomy.streamed else "; prunescope prune can read the checkpoint one block at a time"
    hint = f"; {whole[0]} needs the whole model in memory" if whole else hint
    for recover in dict.fromkeys(job.recipe.recover for job in jobs if job.recipe.recovers):
        hint = f'; recover = "{recover}" needs the whole model and a copy of its weights in memory'
        hint += ' and 16 bytes for every kept weight, "lora" less' if recover == "fine-tune" else ""
    device = "device" if anatomy.device.type == "meta" else anatomy.device.type
    kinds = ("memory cap", f"{device} memory cap")
    kind, cap, most = next((k, c, m) for k, c, m in zip(kinds, caps, peak, strict=True) if c is not None and m > c)
    return MemoryCapError(
        f"a {kind} of {cap / _GIB:.2f} GiB cannot hold one block during pruning: this model and these recipes need "
        f"about {most / _GIB:.2f} GiB{hint}"
    )


def _groups(jobs: Sequence[Job]) -> list[tuple[Job, ...]]:
    """Group jobs that share work; those that share none come first, so that they are saved early."""
    groups: dict[object, list[Job]] = {"at once": []}
    for job in jobs:
        if not job.recipe.calibrated:
            groups["at once"].append(job)
        elif job.recipe.scoring.differentiates:
            groups.setdefault(job.calibration, []).append(job)
    apart = {job for group in groups.values() for job in group}
    groups["block by block"] = [job for job in jobs if job not in apart]
    return [tuple(group) for group in groups.values() if group]


def _by_set(jobs: Sequence[Job], parts: int) -> list[tuple[Job, ...]]:
    """Split jobs into up to `parts` groups of about as many calibration sets each."""
    sets = list(dict.fromkeys(job.calibration for job in jobs))
    parts = min(parts, len(sets))
    place = {calibration: number * parts // len(sets) for number, calibration in enumerate(sets)}
    return [tuple(job for job in jobs if place[job.calibration] == part) for part in range(parts)]


def _halvings(jobs: int) -> Iterable[int]:
    count = 1
    while count < jobs:
        yield count
        count *= 2
    yield max(jobs, 1)


def _cut(jobs: Sequence[Job], count: int) -> list[tuple[Job, ...]]:
    """Split jobs into `count` waves, keeping their order, so that jobs of one calibration set stay together.

    Those that fine-tune the same choice are in one wave.
    """
    alike: dict[Job, list[Job]] = {}
    for job in jobs:
        alike.setdefault(job.choice, []).append(job)
    together = list(alike.values())
    size = max(-(-len(together) // count), 1)
    return [tuple(job for one in together[i : i + size] for job in one) for i in range(0, len(together), size)]


def _size(number: float | int) -> str:
    return naturalsize(number, binary=True)


class _Needs:
    """Estimates for one model and text, in bytes unless stated otherwise."""

    def __init__(
        self,
        anatomy: Anatomy,
        text: CalibrationText | None,
        batch_tokens: int,
        *,
        in_folder: bool = True,
        there: Collection[Job] = (),
    ) -> None:
        self.anatomy = anatomy
        self.there = there
        self.apart = anatomy.device.type not in ("cpu", "mps")
        self.in_folder = in_folder
        self.text = text
        self.batch_tokens = batch_tokens
        self.element = anatomy.element_size
        sizes = [sum(p.numel() for p in block.parameters()) for block in anatomy.blocks]
        self.largest_block = max(sizes) * self.element
        self.whole = sum(sizes) * self.element + anatomy.other_numel * self.element
        tied = getattr(anatomy.model, "all_tied_weights_keys", None) or ()
        head = head_of(anatomy.model)
        self.beside_blocks = self.element * sum(
            anatomy.model.get_parameter(name).numel()
            for name in anatomy.other_names()
            if name not in tied and anatomy.model.get_submodule(name.rpartition(".")[0]) is not head
        )
        self.widest = max(anatomy.shape(layer, role)[0] for layer, role in anatomy)
        self.largest_matrix = max(out * inputs for out, inputs in (anatomy.shape(*key) for key in anatomy))

    def peak(self, jobs: Sequence[Job], states: Place) -> tuple[int, int]:
        """Return the peak memory of a wave of jobs: on the host, and on a device with its own memory."""
        weights = self.whole
        if self.anatomy.streamed:
            weights = self.largest_block + self.beside_blocks
        held, passed = recovery_memory(self.anatomy, jobs)
        results = 0 if self.in_folder else sum(map(self.kept, jobs))
        jobs = choices(jobs, self.there)
        working = self._statistics(jobs) + self._choosing(jobs) + self._passing()
        working += self._encoded(jobs) + self._surveyed(jobs)
        differentiating = [job for job in jobs if job.recipe.scoring.differentiates]
        waiting = 0 if states == "disk" else self.states(jobs)
        if states == "device":
            working, waiting = working + waiting, 0
        if differentiating:
            # Derivatives that are needed beside inputs are kept, those of one calibration set after the other.
            sets = len({job.calibration for job in differentiating if job.recipe.scoring.of_inputs})
            kept = self._weights() * _FLOAT
            working = max(working + sets * kept, self._differentiating(differentiating) + max(sets - 1, 0) * kept)
        on_host = waiting + results + self.largest_matrix * (self.element + 1)
        if not self.apart:
            most = max(_SLACK * (working + on_host), held + _SLACK * (passed + on_host - waiting))
            return int(_BASE + weights + most), 0
        passing = self.largest_block if self.anatomy.streamed else 0  # from the shards to the device
        most = max(_SLACK * working, held + _SLACK * passed)
        return int(_BASE + _SLACK * (on_host + passing)), int(_CONTEXT + weights + most)

    def removable(self, job: Job) -> int:
        """Return the number of weights in a job's scope."""
        return _removable(self.anatomy, job.recipe)

    def _passing(self) -> int:
        """Return the memory of a batch's forward pass through a block."""
        length = max((tokens.shape[1] for tokens in self.text.tokens.values()), default=0) if self.text else 0
        heads = int(self.anatomy.config.num_attention_heads)
        width = self.widest * 4 + self.anatomy.hidden_size * 6 + heads * length
        return max(self.batch_tokens, length) * width * max(self.element, _FLOAT)

    def _choosing(self, jobs: Sequence[Job]) -> int:
        """Return the memory for pruning a block, for one job at a time."""
        solves = any(job.recipe.updates for job in jobs)
        block = self.largest_block * (3 if solves else 2)  # a copy of the dense one, masks, corrected weights
        return int(block + self.largest_matrix * _FLOAT * 4)

    def _surveyed(self, jobs: Sequence[Job]) -> int:
        """Return the memory for the scores of the whole model, for jobs with a single threshold over it, or spectra."""
        sizes = [self.removable(job) * _FLOAT for job in jobs if job.recipe.pattern == MODEL]
        spectra = max((min(shape) for shape in self._weighed(jobs)), default=0) ** 2 * 2 * _DOUBLE
        return sum(sizes) + 2 * max(sizes, default=0) + spectra

    def _weighed(self, jobs: Sequence[Job]) -> list[Shape]:
        """Return the shapes of the matrices whose spectra are needed."""
        weighing = [job.recipe for job in jobs if allocation_named(job.recipe.allocation).weighs]
        return [self._shape(key) for key in self.anatomy if any(recipe.covers(*key) for recipe in weighing)]

    def _differentiating(self, jobs: Sequence[Job]) -> int:
        """Return the memory for derivatives: of every weight, and of the activations and logits of a batch."""
        assert self.text is not None
        tokens = max(GRADIENT_TOKENS, max(tokens.shape[1] for tokens in self.text.tokens.values()))
        twice = any(CURVATURE in job.recipe.scoring.needs for job in jobs)
        activations = len(self.anatomy.blocks) * (self.widest * 4 + self.anatomy.hidden_size * 10)
        activations *= 3 if twice else 1
        kept = self._weights() * _FLOAT * (5 if twice else 3) + sum(self.removable(job) * _FLOAT for job in jobs)
        return int(kept + tokens * (activations + self.anatomy.vocabulary * 4) * _FLOAT)

    def _encoded(self, jobs: Sequence[Job]) -> int:
        """Return the memory for the encoder's output, which covers the first half of every job's text."""
        if not self.anatomy.encoder_decoder or self.text is None:
            return 0
        tokens = sum(self.text.size(job.calibration) for job in jobs if job.calibration) // 2
        return tokens * self.anatomy.hidden_size * self.element

    def _weights(self) -> int:
        """Return the number of weights in all projections."""
        return sum(outputs * inputs for outputs, inputs in map(self._shape, self.anatomy))

    def _shape(self, key: Key) -> Shape:
        return self.anatomy.shape(*key)

    def _statistics(self, jobs: Sequence[Job]) -> int:
        """Return the memory for Gram matrices and their factors, at the largest block."""
        with_gram = [job for job in jobs if GRAM in job.recipe.needs and job.calibration]
        if not with_gram or self.text is None:
            return 0
        worst = 0
        schedule = Schedule(self.anatomy, with_gram, self.text)
        for layer in range(len(self.anatomy.blocks)):
            grams = [
                self.anatomy.shape(layer, group.leader)[1] ** 2 * _FLOAT
                for group in self.anatomy.groups(layer)
                if any(GRAM in job.recipe.needs - job.recipe.spares(group.roles) for job in with_gram)
            ]
            if not grams:
                continue
            sharing = schedule.on_pieces(layer)
            sets = schedule.pieces_by_set(layer)
            held = most_held(schedule.pieces(layer), sets.values()) + len(sets) * _kept(sharing)
            working = 4 if any(job.recipe.correction != NONE for job in with_gram) else 2
            worst = max(worst, sum(grams) * max(held, 1) + max(grams) * working)
        stacked = max(
            sum(self.anatomy.shape(layer, role)[0] * self.anatomy.shape(layer, role)[1] for role in group.roles)
            for layer in range(len(self.anatomy.blocks))
            for group in self.anatomy.groups(layer)
        )
        return worst + stacked * _FLOAT * 4

    def states(self, jobs: Sequence[Job]) -> int:
        """Return the memory for the hidden states of a wave, before and after a block: surveys come first."""
        return max(self._states(streaming(jobs)), self._states(list(surveyed(jobs))))

    def _states(self, reading: Sequence[Job]) -> int:
        if not reading or self.text is None:
            return 0
        schedule = Schedule(self.anatomy, reading, self.text)
        tokens = 0
        for layer in range(len(self.anatomy.blocks)):
            shared = sum(self.text.tokens[piece].numel() for piece in schedule.pieces(layer))
            own = sum(self.text.size(j.calibration) for j in schedule.on_their_own(layer) if j.calibration)
            tokens = max(tokens, shared + own)
        return 2 * tokens * self.anatomy.hidden_size * self.element

    def kept(self, job: Job) -> int:
        """Return the size of a finished variant on disk."""
        return variant_bytes(self.anatomy, job.recipe)

    def tokens_a_block(self, jobs: Sequence[Job]) -> float:
        """Return the tokens that pass through a block, with the jobs' other work counted as additional tokens."""
        recovering, jobs = jobs, choices(jobs, self.there)
        total, blocks = float(differentiated_tokens(jobs)), len(self.anatomy.blocks)
        total += Schedule(self.anatomy, list(surveyed(jobs)), self.text).work / blocks
        head = self.anatomy.vocabulary * self.anatomy.hidden_size / self._weights()
        total += sum(map(recovery_tokens, recovering)) * (1 + head)
        for solves in (False, True):
            some = [job for job in streaming(jobs) if job.recipe.updates == solves]
            total += Schedule(self.anatomy, some, self.text).work / blocks * _OVERHEAD[solves]
        return total + sum(map(self._searched, jobs))

    def _searched(self, job: Job) -> float:
        """Return the tokens whose passes through a block would take as long as a method's search there."""
        shapes = covered_shapes(self.anatomy, job.recipe).values() if job.recipe.scoring.search else ()
        return job.recipe.scoring.search * sum(out * inputs**2 for out, inputs in shapes) / self._weights()

    def seconds(self, waves: Sequence[Sequence[Job]]) -> list[float]:
        """Return the time of each wave, from a short trial; spectra are computed for the first wave that needs any."""
        blocks = len(self.anatomy.blocks)
        loading, a_weight = self.seconds_to_load_and_choose()
        calibrated = self.text is not None and any(job.recipe.calibrated for wave in waves for job in wave)
        a_token = self.seconds_a_token() if calibrated else 0.0
        spectra = self.seconds_for_spectra([job for wave in waves for job in wave])
        times = []
        for wave in waves:
            chosen = choices(wave, self.there)
            passing = a_token * self.tokens_a_block(wave) if calibrated else 0.0
            times.append(blocks * (loading + passing) + a_weight * sum(map(self.removable, chosen)))
            if spectra and self._weighed(chosen):
                times[-1] += spectra
                spectra = 0.0
        return times

    def seconds_for_spectra(self, jobs: Sequence[Job]) -> float:
        """Return the time for the spectra that allocations need, from that of a small matrix."""
        shapes = self._weighed(jobs)
        if not shapes:
            return 0.0
        trial = torch.randn(_TRIAL, _TRIAL, device=self.anatomy.device)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            tail_exponent(squared_singular_values(trial))
            times.append(time.perf_counter() - began)
        return min(times) / _TRIAL**3 / 2 * sum(min(shape) ** 2 * sum(shape) for shape in shapes)

    @torch.no_grad()
    def seconds_to_load_and_choose(self) -> tuple[float, float]:
        """Time loading the first block, and choosing its weights by magnitude: in all, and per weight."""
        anatomy, pattern = self.anatomy, pattern_named("row")
        began = time.perf_counter()
        with anatomy.loaded(0):
            loaded = time.perf_counter()
            weights = 0
            for group in anatomy.groups(0):
                for role in group.roles:
                    scores = magnitude.score(anatomy.weight(0, role))
                    pack_bits(pattern.keep(scores, pattern.uniform(anatomy.shape(0, role), 0.5)))
                    weights += scores.numel()
            chosen = time.perf_counter()
        return loaded - began, (chosen - loaded) / weights

    @torch.no_grad()
    def seconds_a_token(self) -> float:
        """Time the first block on a little text."""
        assert self.text is not None
        piece, tokens = next(iter(self.text.tokens.items()))
        few = tokens[: max(1, self.batch_tokens // piece.length)]
        stream = Stream([few], [piece.language])
        stack = self.anatomy.stacks[0]
        with self.anatomy.loaded(0):
            with self.anatomy.loaded_for_start():
                StackStarter(self.anatomy, stack)(stream)
            times = []
            for _ in range(3):
                began = time.perf_counter()
                list(run_block(self.anatomy.blocks[0], stream, 0, stack, lambda tokens: None))
                if self.anatomy.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
        return min(times) / few.numel()
