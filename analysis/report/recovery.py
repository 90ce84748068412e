"""What a diagnosis found, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from probes.patching import RESTORE
from pruning.text.languages import language_name

from ..frames import labels
from ..metrics.recovery import EVERYTHING, agreement, main_metric


def diagnosis_findings(frame: pd.DataFrame) -> list[str]:
    """Say in plain sentences what a diagnosis found.

    Parameters
    ----------
    frame
        As from :func:`diagnose`: of one variant, language and category.
    """
    first = frame.iloc[0]
    what = labels.category_label(str(first["category"]))
    where = f"{what} in {language_name(str(first['language']))}"
    lost = frame[frame["component"] == EVERYTHING].set_index("metric")
    sentences = [_lost_in_words(lost, where)]
    exact = frame[(frame["direction"] == RESTORE) & frame["low"].notna()]
    main = exact[exact["metric"] == main_metric(exact)] if len(exact) else exact
    if not len(main):
        sentences.append("There is no drop to explain, so no causes are named.")
        return sentences
    stream = main[main["component"] == "residual"].set_index("layer")
    if len(stream):
        sentences += _stream_in_words(main, stream)
    causes = main[main["position"].notna()].sort_values("position").head(3)
    listed = "; ".join(f"{describe(row)}, {_share(row)}" for row in causes.to_dict("records"))
    sentences.append(f"The single components that recover most: {listed}.")
    groups = main[main["component"].isin(["neurons", "random_neurons"])].set_index("component")
    if len(groups) == 2:
        sentences.append(
            f"The language-specific neurons recover {_share(groups.loc['neurons'])}, as many random neurons of the "
            f"same blocks {_share(groups.loc['random_neurons'])}."
        )
    sentences.append(_agreement_in_words(frame))
    return sentences


def _lost_in_words(lost: pd.DataFrame, where: str) -> str:
    metric = "margin_lost" if "margin_lost" in lost.index else "loss_added"
    row = lost.loc[metric]
    name = "the margin of the right choice" if metric == "margin_lost" else "the log-likelihood of a segment"
    interval = f"{row['value']:.2f} nats [{row['low']:.2f}, {row['high']:.2f}]"
    if not (row["low"] > 0):
        return (
            f"Pruning changed {name} ({where}, n = {row['n']:.0f}) by {0 - row['value']:+.2f} nats "
            f"[{0 - row['high']:+.2f}, {0 - row['low']:+.2f}]: no significant drop."
        )
    accuracy = ""
    if "accuracy_lost" in lost.index:
        change = lost.loc["accuracy_lost"]
        value, low, high = (100 * change[column] for column in ("value", "low", "high"))
        accuracy = f", and accuracy by {value:.1f} points [{low:.1f}, {high:.1f}]"
    return f"Pruning lowers {name} by {interval} ({where}, n = {row['n']:.0f}){accuracy}."


def _stream_in_words(main: pd.DataFrame, stream: pd.DataFrame) -> Iterator[str]:
    reached = stream[stream["value"] >= 0.5]
    layer = int(reached.index.min()) if len(reached) else int(stream["value"].idxmax())
    here = main[main["layer"] == layer].set_index("component")
    if len(reached):
        yield (
            f"Restoring the residual stream after block {layer} recovers {_share(stream.loc[layer])} of the drop: half "
            "of the damage is done by then. Blocks are numbered from 0."
        )
    else:
        yield (
            f"Restoring the residual stream recovers at most {_share(stream.loc[layer])} of the drop, after block "
            f"{layer}. Blocks are numbered from 0."
        )
    yield (
        f"After block {layer}, restoring the language-agnostic part alone recovers {_share(here.loc['agnostic'])}, the "
        f"language-specific part {_share(here.loc['specific'])}, and a random subspace of the same rank "
        f"{_share(here.loc['random'])}."
    )


def _agreement_in_words(frame: pd.DataFrame) -> str:
    rho, top, number = agreement(frame)
    return (
        f"Over the {number} components that were patched exactly, attribution and exact recovery correlate with "
        f"Spearman's ρ = {rho:.2f}; {top} of the 10 that attribution ranks highest are in the exact top 10."
    )


def describe(row: Mapping[Any, Any]) -> str:
    """Return a component in words."""
    layer = "" if pd.isna(row["layer"]) else f" in block {int(row['layer'])}"
    return {
        "weights": f"undoing the mask of {row['role']}{layer}",
        "output": f"the output of {row['role']}{layer}",
        "specific": f"the language-specific part{layer.replace('in', 'after')}",
        "neurons": "the language-specific neurons",
        "random_neurons": "random neurons",
    }.get(str(row["component"]), f"{row['component']}{layer}")


def _share(row: Any) -> str:
    value, low, high = (round(100 * float(row[name])) for name in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"
