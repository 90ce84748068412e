"""Kills a small study with a diagnosis at random moments, and looks at what is left of it: ``make soak KILLS=20``.

The study is started again after every kill until it ends; then the next one begins, until there were as many kills as
were asked for. Every file that it leaves must be that of an undisturbed run, byte for byte; and no unit of work that
was finished may be done again: what was running at the moment of a kill is repeated, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STUDY = """
model = "model"
languages = ["en", "sw", "zh"]
dtype = "float32"
[calibration]
sets = ["en", "sw"]
samples = 8
length = 32
[[recipes]]
method = ["wanda", "sparsegpt"]
sparsity = 0.5
[[recipes]]
method = "magnitude"
sparsity = 0.3
[evaluation]
segments = 16
fit_segments = 16
max_length = 40
[tasks]
per_category = 4
"""
DIAGNOSIS = ["--variant", "wanda-0.5-row-pruned-sw-s0", "--language", "sw", "--category", "all"]
#: What may differ: seconds and times of files, and who holds the folder.
TIMED = ("provenance.json", "records/", ".lock")


def carry_out(log: Path, study: Path, out: Path) -> None:
    """Run and diagnose the study as the command line does, and log where every unit begins and ends."""
    from analysis.cli import main
    from analysis.study import run
    from analysis.study.units import Unit

    class Logged(run.ThisProcess):
        def run(self, stages: Sequence[Any], units: Sequence[Unit], progress: Any) -> None:
            super().run([LoggedStage(stage) for stage in stages], units, progress)

    class LoggedStage:
        def __init__(self, stage: Any) -> None:
            self.name, self._stage = stage.name, stage

        def run(self, context: Any, unit: Unit, advance: Any) -> None:
            results = [f"{output.name} {output.key}" for output in unit.outputs]
            write("begins", results)
            self._stage.run(context, unit, advance)
            write("ends", results)

    def write(event: str, results: list[str]) -> None:
        with log.open("a") as file:
            file.write(json.dumps([event, results]) + "\n")

    run.ThisProcess = Logged  # type: ignore[misc]
    for arguments in (["run", study, "--out", out], ["diagnose", out, *DIAGNOSIS]):
        sys.argv = ["prunescope", *map(str, arguments)]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise


class Run:
    """A study in a folder of its own, started as often as it takes."""

    def __init__(self, place: Path, name: str) -> None:
        self.out = place / name
        self._log = place / f"{name}.units.jsonl"
        self._errors = place / f"{name}.log"
        self._command = [sys.executable, __file__, "--carry-out", self._log, place / "study.toml", self.out]
        self.starts = 0

    def start(self, limit: float | None = None) -> bool:
        """Start it, kill it when its time is over, and tell whether it ended before."""
        self.starts += 1
        with (
            self._errors.open("ab") as errors,
            subprocess.Popen(self._command, stdout=errors, stderr=errors) as process,
        ):
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return False
        if code:
            raise SystemExit(f"the study ended with status {code}; see {self._errors}")
        return True

    def before_first_unit(self, poll: float = 0.02) -> float:
        """Start it, kill it when the first unit begins, and return the seconds until then."""
        began = time.monotonic()
        with (
            self._errors.open("ab") as errors,
            subprocess.Popen(self._command, stdout=errors, stderr=errors) as process,
        ):
            while not self._log.exists() and process.poll() is None:
                time.sleep(poll)
            process.kill()
        return time.monotonic() - began

    def repeated(self) -> tuple[int, int, int]:
        """Return how many units there are, begun more than once, and begun again after they had ended."""
        begun: Counter[str] = Counter()
        ended: set[str] = set()
        again = set()
        for line in self._log.read_text().splitlines():
            event, results = json.loads(line)
            unit = " ".join(results)
            if event == "begins":
                begun[unit] += 1
                again |= {unit} if ended & set(results) else set()
            else:
                ended |= set(results)
        return len(begun), sum(number > 1 for number in begun.values()), len(again)

    def records(self) -> dict[str, tuple[str, int]]:
        """Return key and time of writing of every result on record."""
        folder = self.out / "records"
        return {
            path.relative_to(folder).as_posix(): (json.loads(path.read_text())["key"], path.stat().st_mtime_ns)
            for path in folder.rglob("*.json")
        }


def rewritten(before: dict[str, tuple[str, int]], after: dict[str, tuple[str, int]]) -> list[str]:
    """Return the results that were finished before and written again although they depend on nothing that changed.

    >>> rewritten({"a": ("x", 1), "b": ("x", 1), "c": ("x", 1)}, {"a": ("x", 1), "b": ("x", 2), "c": ("y", 2)})
    ['b']
    """
    return [
        name
        for name, record in before.items()
        if name in after and after[name] != record and after[name][0] == record[0]
    ]


def differing(one: Path, other: Path) -> tuple[Counter[str], list[str]]:
    """Count the files of a kind, and return those that are not the same in two folders."""
    names = {name for folder in (one, other) for name in _files(folder)}
    kinds = Counter(name.split("/")[0] for name in names)
    return kinds, sorted(name for name in names if _content(one / name) != _content(other / name))


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(TIMED):
            yield name


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def soak(place: Path, kills: int, seed: int, console: Console) -> bool:
    """Kill as often as asked for, print what was found, and tell whether all was as it must be."""
    from checkpoints import checkpoint

    checkpoint(place / "model")
    (place / "study.toml").write_text(STUDY)
    startup = Run(place, "startup").before_first_unit()
    undisturbed = Run(place, "undisturbed")
    began = time.monotonic()
    undisturbed.start()
    work = max(time.monotonic() - began - startup, 0.1)
    console.print(f"An undisturbed run takes {startup:.1f} s to start and {work:.1f} s of work; seed {seed}.")
    table = Table(
        "study", "kills", "seconds", "units", "begun again", "redone", "records rewritten", "files", "other bytes"
    )
    draw = random.Random(seed)
    left, number, fine = kills, 0, True
    while left:
        number += 1
        study, began = Run(place, f"killed-{number}"), time.monotonic()
        records: dict[str, tuple[str, int]] = {}
        lost: list[str] = []
        # As many kills in a study as its work has room for, so that each falls into the work and not into the start.
        mean = 2 * work / (min(left, 8) + 1)
        while not study.start(startup + draw.uniform(0, mean) if left else None):
            left -= 1
            now = study.records()
            lost += rewritten(records, now)
            records = now
        lost += rewritten(records, study.records())
        units, twice, redone = study.repeated()
        kinds, other = differing(undisturbed.out, study.out)
        killed = study.starts - 1
        table.add_row(
            str(number),
            str(killed),
            f"{time.monotonic() - began:.0f}",
            str(units),
            str(twice),
            str(redone),
            str(len(lost)),
            str(kinds.total()),
            str(len(other)),
        )
        for name in [*lost, *other]:
            console.print(f"study {number}: {name}", highlight=False)
        fine &= not (redone or lost or other) and twice <= killed
        if not other:
            shutil.rmtree(study.out)
    console.print(table)
    console.print("files compared: " + ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items())))
    return fine


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--carry-out"]:
        carry_out(*map(Path, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    if not soak(place, arguments.kills, arguments.seed, Console()):
        raise SystemExit(f"something is not as it should be; all of it is in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
