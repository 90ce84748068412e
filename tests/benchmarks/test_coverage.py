"""How often intervals hold the truth and tests find what is not there: the table of docs/statistics.md.

    make benchmarks, or pytest tests/benchmarks/test_coverage.py -s

PRUNESCOPE_BENCH_RUNS studies are simulated for each number (2000 by default: its standard error is half a point).
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
from benchmarks.harness import number
from simulated import Design, accuracy_rates, change_rate, overlap_rates, rates, recovery_rate, share_rate
from simulated_geometry import verdict_rates, wrongly

from analysis.stats.meta import pooled
from analysis.stats.power import Components, power, simulate

DESIGNS = [
    Design(sets, draws, segments, quality, common)
    for draws, sets, segments, quality, common in product((2, 5), (4, 8), (40, 400), (0.0, 0.3), (False, True))
] + [Design(4, draws, 400, uneven=True) for draws in (2, 3, 5)]


def runs() -> int:
    return number("RUNS", 2000)


def shown(capsys, table: pd.DataFrame, title: str) -> None:
    with capsys.disabled():
        print(f"\n{title}\n{(100 * table).round(1).to_string()}")


def test_contrasts_over_draws_and_segments(capsys):
    found = pd.DataFrame({str(design): rates(design, runs()) for design in DESIGNS}).T
    shown(capsys, found, "contrasts: per cent of studies")
    even = found[~found.index.str.contains("varies")]
    assert (even.filter(like="test").fillna(0) <= 0.06 + 3 * np.sqrt(0.06 / runs())).all().all()
    assert (even.filter(like="interval") > 0.93 - 3 * np.sqrt(0.07 / runs())).all().all()


def test_accuracy_of_pairs_from_templates(capsys):
    sizes = list(product((2, 3, 5), (16, 40), (1, 10)))
    found = pd.DataFrame({size: accuracy_rates(*size, runs=runs()) for size in sizes}).T
    found.index.names = ["draws", "templates", "pairs"]
    shown(capsys, found, "two sets' difference in accuracy: per cent of studies")
    assert (found["test"] < 0.08).all()


def test_intervals_of_shares(capsys):
    places = [(160, 1, 0.0), (16, 10, 0.0), (16, 10, 0.1), (16, 10, 0.4), (40, 4, 0.0), (40, 4, 0.4)]
    shares = (0.5, 0.9, 0.99, 1.0)
    found = pd.DataFrame({place: [share_rate(share, *place, runs()) for share in shares] for place in places}).T
    found.columns = pd.Index(shares)
    shown(capsys, found, "a share (templates, pairs, likeness): per cent held")
    assert (found > 0.925).all().all()
    changes = [(0.05, 0.05), (0.05, 0.2), (0.0, 0.05)]
    found = pd.DataFrame(
        {
            place: [change_rate(up, down, *place, runs()) if up or not place[2] else np.nan for up, down in changes]
            for place in places
        }
    ).T
    found.columns = pd.Index(changes)
    shown(capsys, found, "a change in a share: per cent held")
    assert (found.fillna(1) > 0.925).all().all()


def test_intervals_of_recovered_shares(capsys):
    units = (10, 20, 40, 80)
    found = pd.DataFrame({n: [recovery_rate(n, shape, runs()) for shape in (9, 4, 1)] for n in units}).T
    found.columns = pd.Index(["drop varies by 1/3", "by 1/2", "by 1"])
    shown(capsys, found, "a recovered share, by templates: per cent held")


def test_overlap_of_masks_over_draws(capsys):
    sizes = list(product((2, 4, 8), (2, 3, 5), (False, True)))
    found = pd.DataFrame({size: overlap_rates(*size[:2], runs(), uneven=size[2]) for size in sizes}).T
    found.index.names = ["sets", "draws", "one set varies 5 ×"]
    shown(capsys, found, "overlap within and between sets: per cent held")
    assert (found.fillna(1) > 0.92).all().all()


def test_verdicts_on_planted_geometry(capsys):
    """A tenth of the runs of the other tables, since a run takes up to a second."""
    worst = {}
    for segments, hidden in product((40, 100, 400), (64, 640)):
        found = verdict_rates(segments, hidden, max(runs() // 10, 20))
        shown(capsys, found, f"verdicts, {segments} segments, {hidden} dimensions: per cent")
        worst[segments, hidden] = max(wrongly(row, name) for name, row in found.iterrows())
    assert max(worst.values()) <= 0.06 + 3 * np.sqrt(0.06 / max(runs() // 10, 20)), worst


def test_effects_pooled_over_studies(capsys):
    rng = np.random.default_rng(0)
    found = {}
    for k, tau in product((2, 3, 5, 10), (0.0, 0.1, 0.3)):
        inside = []
        for _ in range(runs()):
            errors = rng.uniform(0.1, 0.4, k)
            mean = pooled(0.2 + tau * rng.normal(size=k) + errors * rng.normal(size=k), errors)
            inside.append((mean.low <= 0.2 <= mean.high, mean.high - mean.low))
        cover, width = np.array(inside, dtype=float).T
        found[f"{k} studies, tau {tau}"] = {"interval": cover.mean(), "width": np.median(width) / 100}
    table = pd.DataFrame(found).T
    shown(capsys, table, "pooled effects: per cent of studies; median width")
    assert (table["interval"] > 0.92 - 3 * np.sqrt(0.07 / runs())).all()


def test_power_that_is_predicted(capsys):
    """From one study of three draws of eight sets, against that of the variances which made it."""
    truth = Components(8, np.full((1, 1), 0.01), 1.0, 0.09, 0.09, 16, np.full((1, 1), 0.01), 100)
    rng = np.random.default_rng(0)
    rows = {}
    for draws, effect in product((2, 3, 5), (0.1, 0.2, 0.3)):
        predicted = []
        for _ in range(20):
            study = simulate(truth, 3, 100, 1, rng, blocks=1)
            found = Components.of([[of[0] for of in own] for own in study])
            predicted.append(
                [
                    power(one, "sets", effect, draws=draws, units=100, runs=400)
                    for one in (found, found.at_upper_limit())
                ]
            )
        has = power(truth, "sets", effect, draws=draws, units=100, runs=runs())
        rows[draws, effect] = [has, *np.mean(predicted, axis=0), *np.quantile(np.array(predicted)[:, 0], [0.1, 0.9])]
    found = pd.DataFrame(rows, index=["has", "predicted", "at the upper limit", "predicted: 10 %", "90 %"]).T
    shown(capsys, found, "power (draws, effect)")
    assert (found["predicted"] - found["has"]).abs().max() < 0.1
