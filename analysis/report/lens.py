"""What the frame ``lens`` says, in sentences: only what an interval supports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from probes import DENSE
from probes.lens import LENSES
from pruning.text.languages import language_name

from ..frames import Frames, labels, of_recipe


def lens_of_dense(frame: pd.DataFrame) -> Iterator[str]:
    """Yield after which blocks the dense model's predictions are in another language than the text."""
    lens = LENSES[0]  # a translator fitted on a language's text predicts that language, whatever the model does
    rows = frame[(frame["lens"] == lens) & (frame["method"] == DENSE) & (frame["metric"] == "token_share_lead")]
    if not len(rows):
        return
    vocabulary = frame[frame["metric"] == "vocabulary_share"].set_index("other_language")["value"]
    even = vocabulary.loc[rows["other_language"]].to_numpy() - vocabulary.loc[rows["language"]].to_numpy()
    ahead = rows[rows["low"] > np.maximum(even, 0)]
    said = []
    for language in labels.in_order(ahead["language"].unique()):
        own = ahead[ahead["language"] == language]
        by_language = own.groupby(own["other_language"].astype(str))["layer"].unique()
        most = max(labels.in_order(by_language.index), key=lambda name: len(by_language[name]))
        said.append(
            f"{language_name(language)} text, {language_name(most)} tokens after {blocks_listed(by_language[most])}"
        )
    others = [name for name in labels.in_order(rows["language"].unique()) if name not in set(ahead["language"])]
    none = f" Of text in {', '.join(map(language_name, others))} this holds after no block." if others and said else ""
    if said:
        yield (
            f"By the {lens} lens, tokens of another language have more probability in the dense model than those of "
            f"the text's own, and more than the numbers of these tokens in the vocabulary account for (95 % intervals "
            f"over segments, not corrected for their number), in {'; '.join(said)}.{none}"
        )
    else:
        yield (
            f"By the {lens} lens, the tokens of no other language have clearly more probability than those of the "
            "text's own language after any block of the dense model."
        )


def lens_of_recipe(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield how far the final prediction is from the dense one, and whether languages of tokens have changed."""
    lens, rows = _best(of_recipe(frames["lens"], recipe))
    if not len(rows):
        return
    kl = rows[rows["metric"] == "kl"]
    last = kl[kl["layer"] == kl["layer"].max()].groupby("language", observed=True)["value"].mean()
    change = rows[rows["metric"] == "kl_change"]
    farther, nearer = int((change["low"] > 0).sum()), int((change["high"] < 0).sum())
    yield (
        f"The final prediction is {last.mean():.2f} nats from the dense model's (KL, mean over languages and models; "
        f"most in {language_name(str(last.idxmax()))}: {last.max():.2f}). Through the {lens} lens, predictions are "
        f"farther from it than the dense model's after the same block in {farther} of {len(change)} "
        f"cases (each block, language and model) and nearer in {nearer}. Only cases count whose 95 % interval is on "
        "one side of zero; by chance alone, one in 40 would be on either side."
    )
    every = of_recipe(frames["lens"], recipe)
    yield from _languages_of_tokens(every[every["lens"] == LENSES[0]])


def margins_of_recipe(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield after which block right choices overtake wrong ones, before and after, and where that has moved."""
    frame = frames["lens_margins"]
    lens, rows = _best(of_recipe(frame, recipe))
    for task, own in rows.groupby("task", observed=True):
        of_task = frame[(frame["task"] == task) & (frame["lens"] == lens)]
        dense = of_task[(of_task["method"] == DENSE) & (of_task["metric"] == "overtaking")]
        before = dense.groupby("category", observed=True)["value"].mean()
        change = own[own["metric"] == "overtaking_change"]
        after = change.groupby("category", observed=True)["value"].mean()
        listed = [f"{name} {before[name]:.1f} ({after[name]:+.1f})" for name in labels.categories_of(change)]
        if listed:
            later, earlier = int((change["low"] > 0).sum()), int((change["high"] < 0).sum())
            yield (
                f"By the {lens} lens, the right choice of the pairs of {task} that the dense model gets right "
                f"overtakes the wrong one for good after block {', '.join(listed)} on average (in brackets: the change "
                f"in pairs that both models get right); it is clearly later in {later} of {len(change)} cases (each "
                f"model, language and category) and earlier in {earlier}, by 95 % intervals over templates."
            )


def _best(frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Return the tuned lens with its rows, or the logit lens if there is no other."""
    there = set(frame["lens"].dropna().astype(str))
    lens = next((name for name in reversed(LENSES) if name in there), LENSES[0])
    return lens, frame[frame["lens"] == lens]


def _languages_of_tokens(rows: pd.DataFrame) -> Iterator[str]:
    """Say whether the text's own language has more or less probability than before, and English, in other text."""
    change = rows[rows["metric"] == "token_share_change"]
    kind, language = change["other_language"].astype(str), change["language"].astype(str)
    parts = {"of the text's own language": kind == language}
    if (kind == "en").any() and (language != "en").any():
        parts["of English, in text of other languages,"] = (kind == "en") & (language != "en")
    said = []
    for name, which in parts.items():
        own = change[which]
        more, less = own[own["low"] > 0], own[own["high"] < 0]
        if len(more) or len(less):
            largest = own.loc[[*more.index, *less.index]]
            largest = largest.loc[largest["value"].abs().idxmax()]
            said.append(
                f"tokens {name} gain probability in {len(more)} of {len(own)} cases and lose it in {len(less)} (most: "
                f"{100 * largest['value']:+.1f} points, {language_name(str(largest['language']))}, block "
                f"{int(largest['layer'])})"
            )
    if said:
        yield (
            f"After pruning, in the predictions of the logit lens after each block, {'; '.join(said)}. Cases are "
            "counted as before."
        )
    else:
        yield "No change in the languages of the tokens predicted after each block has an interval that excludes zero."


def blocks_listed(layers: Iterable[float | int]) -> str:
    """Return blocks in words, with ranges.

    >>> blocks_listed([3]), blocks_listed([5, 2, 3, 4, 9])
    ('block 3', 'blocks 2-5, 9')
    """
    found = sorted({int(layer) for layer in layers})
    runs: list[list[int]] = []
    for layer in found:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    listed = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
    return f"block{'s' * (len(found) > 1)} {listed}"
