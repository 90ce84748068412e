"""What the benchmarks share: sizes from the environment, text, timing in turn, and where the time goes.

Every benchmark prints figures and checks only that they can be right. What is compared runs in turn in one process, so
that drift of the machine's speed hits all of it, and is given as ratios of times of the same round.

    PRUNESCOPE_BENCH_SIZES    samples x tokens, such as "32x256 128x512"
    PRUNESCOPE_BENCH_SHAPES   outputs x inputs of matrices, such as "4096x4096"
    PRUNESCOPE_BENCH_BLOCKS   only the first so many blocks of the embedded model
    PRUNESCOPE_BENCH_SAMPLE   blocks that are timed where the time of the others is worked out from them
    PRUNESCOPE_BENCH_ROUNDS   how often everything is timed
    PRUNESCOPE_BENCH_TEXT     text of your own in place of the bundled one, such as "/text/{lang}.jsonl"
    PRUNESCOPE_BENCH_8B       folder (20 GB free) for a checkpoint of Llama-3-8B's shape
    PRUNESCOPE_BENCH_MEMORY   the memory cap that it is pruned under, such as "6GiB"
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from pruning import CalibrationSet, text_source
from pruning.text.calibration import CalibrationText, Piece

# -- sizes ---------------------------------------------------------------------------------------------------


def pairs(name: str, default: str) -> list[tuple[int, int]]:
    """Return the sizes that PRUNESCOPE_BENCH_`name` lists, such as ``32x256 128x512``."""
    listed = os.environ.get(f"PRUNESCOPE_BENCH_{name}") or default
    return [(int(one), int(other)) for one, _, other in (size.partition("x") for size in listed.split())]


def number(name: str, default: int) -> int:
    """Return the number that PRUNESCOPE_BENCH_`name` is."""
    return int(os.environ.get(f"PRUNESCOPE_BENCH_{name}") or default)


def in_words(pair: Any) -> str | None:
    """Return the id of a test that is given a pair of numbers."""
    return f"{pair[0]}x{pair[1]}" if isinstance(pair, tuple) else None


# -- times ---------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object]) -> float:
    """Return how long a function takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turn(
    rounds: int, runs: Mapping[str, Callable[[], object]], after: Callable[[str], object] = lambda name: None
) -> dict[str, list[float]]:
    """Return the seconds of each function in each round; they take turns.

    Not timed is `after`, which is called with the name of each when it has run.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
            after(name)
    return times


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Return the ratio of two functions' times in each round."""
    return [a / b for a, b in zip(one, other, strict=True)]


def paired_ratios(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[float]:
    """Return the ratios of two functions' times, after a run of each that is not counted."""
    one()
    other()
    times = in_turn(rounds, {"one": one, "other": other})
    return ratios(times["one"], times["other"])


def report(name: str, values: Sequence[float]) -> None:
    """Print the median of some ratios, and their range if there are several."""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    print(f"  {name}: {statistics.median(values):.3f}{spread}", flush=True)


def headline(text: str) -> None:
    """Print what the figures below are of, and with how many threads."""
    print(f"\n{text}; {torch.get_num_threads()} threads", flush=True)


class Clock:
    """Tells how long each part of something took; a part that runs inside another is not counted there as well.

    Attributes
    ----------
    seconds
        Of each part, in all.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside a ``with`` block as a part."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Count the parts of the engine's sweeps from now on, until `patch` is undone."""
        engine = import_module("pruning.engine.sweep")  # the package has a function of that name
        flow = import_module("pruning.engine.flow")
        streams = import_module("pruning.engine.streams")
        choices = import_module("pruning.engine.choosing")
        workspace = import_module("pruning.engine.workspace")
        sparsegpt = import_module("pruning.methods.sparsegpt")
        statistics_ = import_module("pruning.statistics")
        for place, name, part in (
            (streams.StackStarter, "__call__", "embedding the text"),
            (statistics_.InputStatistics, "add", "statistics"),
            (flow, "together", "statistics"),
            (choices, "scored", "scores"),
            (engine, "choose", "choosing"),
            (choices, "_solve", "solver"),
            (sparsegpt, "factor", "factorization"),
            (sparsegpt._Removal, "_choose", "choosing in the solver"),
            (workspace.Workspace, "put", "packing the masks"),
        ):
            patch.setattr(place, name, self._function(getattr(place, name), part))
        for place in (streams, flow):
            patch.setattr(place, "run_block", self._generator(place.run_block, "forward passes"))
        patch.setattr(flow, "_pruned", self._context(flow._pruned, "writing weights"))

    def _function(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        return watched

    def _generator(self, original: Callable[..., Iterator[Any]], name: str) -> Callable[..., Iterator[Any]]:
        def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = original(*args, **kwargs)
            while True:
                with self.part(name):
                    item = next(items, items)
                if item is items:
                    return
                yield item

        return watched

    def _context(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        @contextmanager
        def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
            context = original(*args, **kwargs)
            with self.part(name):
                value = context.__enter__()
            try:
                yield value
            finally:
                with self.part(name):
                    context.__exit__(None, None, None)

        return watched

    def report(self, total: float, unit: float, name: str) -> None:
        """Print the share of each part in `total` seconds, in units of `unit` seconds."""
        print(f"  where the time goes, over {name}:", flush=True)
        parts = dict(sorted(self.seconds.items(), key=lambda part: -part[1]))
        for part, value in (parts | {"all else": total - sum(parts.values())}).items():
            print(f"    {part}: {value / unit:.3f} ({value:.2f} s)", flush=True)


# -- text ----------------------------------------------------------------------------------------------------


def token_blocks(tokenizer: Any, language: str, samples: int, length: int) -> Tensor:
    """Return blocks of text for timing, each with BOS in front; the text is repeated if there is too little of it."""
    own = os.environ.get("PRUNESCOPE_BENCH_TEXT")
    source = text_source(f"file:{own}" if own else "bundled")
    tokens: list[int] = []
    for segment in source.segments(language):
        tokens += tokenizer(segment.text + "\n", add_special_tokens=False)["input_ids"]
        if len(tokens) >= samples * (length - 1):
            break
    text = torch.tensor(tokens).repeat(-(-samples * (length - 1) // len(tokens)))[: samples * (length - 1)]
    return torch.cat([torch.full((samples, 1), tokenizer.bos_token_id), text.reshape(samples, length - 1)], dim=1)


def calibration_text(blocks: Mapping[str, Tensor]) -> tuple[CalibrationText, dict[str, CalibrationSet]]:
    """Return given blocks of text as one calibration set a language."""
    tokens, pieces, sets = {}, {}, {}
    for language, ids in blocks.items():
        samples, length = ids.shape
        sets[language] = CalibrationSet.named(language, samples=samples, length=length)
        piece = Piece(language, length, 0, samples)
        tokens[piece] = ids
        pieces[sets[language]] = [piece]
    return CalibrationText(tokens, pieces), sets
