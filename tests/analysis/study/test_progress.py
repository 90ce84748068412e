"""Progress where there is no terminal: lines in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from analysis.study import progress
from analysis.study.progress import WorkProgress


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_long_unit_says_now_and_then_how_far_it_is(clock):
    log = io.StringIO()
    with WorkProgress(1000.0, Console(file=log, width=200)) as bar:
        bar.stage("reading")
        for _ in range(100):
            clock[0] += 6
            bar.advance(10.0)
    assert log.getvalue().splitlines() == [
        "[  0 %] reading",
        "[ 20 %] reading (about 8 min left)",
        "[ 40 %] reading (about 6 min left)",
        "[ 60 %] reading (about 4 min left)",
        "[ 80 %] reading (about 2 min left)",
        "[100 %] reading (about 0 s left)",
    ]


def test_short_units_say_nothing_but_their_names(clock):
    log = io.StringIO()
    with WorkProgress(100.0, Console(file=log, width=200)) as bar:
        for name in ("pruning", "reading"):
            bar.stage(name)
            for _ in range(50):
                clock[0] += 1
                bar.advance(1.0)
    assert log.getvalue().splitlines() == ["[  0 %] pruning", "[ 50 %] reading (about 50 s left)"]
