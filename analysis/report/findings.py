"""What the frames of a study say, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

import numpy as np
import pandas as pd

from probes import DENSE
from pruning.text.languages import language_name

from ..frames import ALL, Frames, labels, of_recipe, recipes_of
from ..metrics import mask_overlap
from ..metrics.contrasts import OTHERS, OWN, SIGNIFICANT
from .catalogue import ALL_MODELS, section_of
from .dose import breaking_points
from .geometry import geometry_of_dense, geometry_of_recipe
from .lens import lens_of_dense, lens_of_recipe, margins_of_recipe
from .recipes import recipes_compared
from .routing import routing_of_dense, routing_of_recipe


def study_findings(frames: Frames) -> Iterator[tuple[str, list[str]]]:
    """Yield what the frames say of all models and of each recipe, in plain sentences computed from the frames."""
    perplexity = _metric(frames["perplexity"], "perplexity")
    dense = perplexity[perplexity["method"] == DENSE].set_index("language")["value"]
    bits = _metric(frames["perplexity"], "bits_per_byte")
    per_byte = bits[bits["method"] == DENSE].set_index("language")["value"]
    best, worst = str(per_byte.idxmin()), str(per_byte.idxmax())
    before = (
        f"The dense model predicts {language_name(best)} best ({per_byte.min():.2f} bits per byte, perplexity "
        f"{labels.three_digits(dense[best])}) and {language_name(worst)} worst ({per_byte.max():.2f} bits per byte, "
        f"perplexity {labels.three_digits(dense[worst])})."
    )
    factors = []
    for recipe in recipes_of(perplexity):
        rows = of_recipe(perplexity, recipe)
        ratio = rows["value"].to_numpy() / dense.loc[rows["language"].astype(str)].to_numpy()
        factors.append(f"{labels.short(np.exp(np.log(ratio).mean()))} ({labels.recipe_label(recipe)})")
    after = (
        f"{_compression(recipes_of(perplexity))} multiplies perplexity by {', '.join(factors)}; geometric means over "
        "languages and calibration sets."
    )
    dense_only = (_knowledge(frames["subspaces"]), geometry_of_dense(frames["geometry"]))
    read = (routing_of_dense(frames["routing"]), lens_of_dense(frames["lens"]))
    between = (recipes_compared(frames["recipe_contrasts"]), breaking_points(frames["dose"]))
    yield ALL_MODELS, [before, after, *chain(*between, *dense_only, *read)]
    for recipe in recipes_of(perplexity):
        sentences = [sentence for part in _PARTS for sentence in part(frames, recipe)]
        yield section_of(recipe), sentences


def _compression(recipes: Sequence[Mapping[str, Any]]) -> str:
    """Say what was done to the models of a study."""
    if not any(map(labels.maskless, recipes)):
        return "Pruning"
    return "Quantizing" if all(map(labels.quantized, recipes)) else "Compression"


def _knowledge(frame: pd.DataFrame) -> Iterator[str]:
    dense = frame[frame["method"] == DENSE].groupby("metric", observed=True)["value"].mean()
    if "agnostic_retrieval" in dense:
        yield (
            f"The nearest neighbour of a segment in another language is its translation in "
            f"{dense['agnostic_retrieval']:.0%} of cases by the language-agnostic part and in "
            f"{dense['whole_retrieval']:.0%} by the whole state."
        )


def _text_matters(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    rows = of_recipe(_metric(frames["perplexity"], "perplexity"), recipe)
    residual = of_recipe(frames["signal"], {**recipe, "metric": "snr_db", "role": "residual"})
    last = residual[residual["layer"] == residual["layer"].max()]
    own, total = _own_language_best(rows, lowest=True)
    signal_own, _ = _own_language_best(last, lowest=False)
    tests = of_recipe(frames["contrasts"], {**recipe, "metric": "log_perplexity"})
    if total:
        yield (
            "Among models calibrated on a single language, the one calibrated on the evaluated language has the lowest "
            f"perplexity in {own} of {total} languages and the highest SNR after the last block in {signal_own} of "
            f"{total}."
        )
    against = tests[tests["other_calibration"] == OTHERS]
    for row in against[against["calibration"] == OWN].to_dict("records"):
        yield (
            f"Calibrating on the evaluated language multiplies its perplexity by {np.exp(row['value']):.2f} "
            f"{_interval(np.exp(row['low']), np.exp(row['high']))}relative to the other single languages (geometric "
            f"mean over languages; {_permuted(row)})."
        )
    pairs = tests[tests["other_calibration"] != OTHERS]
    if len(pairs):
        number = int(pairs["p_adjusted"].notna().sum())
        found = int((pairs["p_adjusted"] < SIGNIFICANT).sum())
        if number:
            yield (
                f"{found} of {number} differences in perplexity between two calibration sets are significant: larger "
                "than draws of the same text and the choice of segments explain."
            )
            if common := mask_overlap.draws_share(of_recipe(frames["mask_overlap"], recipe)):
                yield (
                    f"Draws of one calibration set have up to {common:.0%} of their text in common, so they vary less "
                    "than independent draws would, and these differences look more certain than they are: add text, "
                    "or lower calibration.samples."
                )
        else:
            yield (
                "Whether two calibration sets differ in perplexity cannot be tested: no set was drawn with a second "
                "seed, so it is unknown what another draw of the same text would change. Give calibration.seeds two "
                "values to find out."
            )


def _permuted(row: Mapping[Any, Any]) -> str:
    if np.isfinite(row["p_value"]):
        return f"p = {row['p_value']:.2g}, permuting which set belongs to which language"
    return "one draw of each set: not tested"


def _interval(low: float, high: float) -> str:
    return f"[{low:.2f}, {high:.2f}] " if np.isfinite(low) else ""


def _where_the_damage_is(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    snr = of_recipe(frames["signal"], {**recipe, "metric": "snr_db"})
    by_layer = snr[snr["role"] == "residual"].groupby("layer", observed=True)["value"].mean()
    encoder = labels.encoder_blocks(snr)
    stacks = {"": by_layer}
    if encoder:
        stacks = {" of the encoder": by_layer[by_layer.index < encoder]}
        stacks |= {" of the decoder": by_layer[by_layer.index >= encoder]}
    for stack, own in stacks.items():
        finite = own[np.isfinite(own)]
        if len(finite) > 1:
            fall = finite.diff().dropna()
            yield (
                f"The SNR of the residual stream{stack} is {finite.iloc[0]:.1f} dB after the first block and "
                f"{finite.iloc[-1]:.1f} dB after the last (minimum: {finite.min():.1f} dB after block "
                f"{finite.idxmin()}); it falls most in block {fall.idxmin()} ({fall.min():+.1f} dB). Blocks are "
                f"numbered from 0{f', through both stacks (the decoder: from {encoder})' if encoder else ''}."
            )
    roles = snr[snr["role"] != "residual"].groupby(["role", "layer"], observed=True)["value"].mean()
    if len(roles):
        role, layer = roles.idxmin()
        yield f"The projection with the lowest SNR is {role} in block {layer} ({roles.min():.1f} dB)."
    errors = of_recipe(frames["subspaces"], recipe)
    middle = errors.groupby("metric", observed=True)["value"].median()
    specific, agnostic = middle["specific_error_centred"], middle["agnostic_error_centred"]
    yield (
        f"Relative to its own spread, the language-{'agnostic' if agnostic < specific else 'specific'} part of the "
        f"hidden states is better preserved: median squared error {specific:.2g} (specific) and {agnostic:.2g} "
        "(agnostic) over layers, languages and calibration sets."
    )
    spread = {}
    for part in ("specific", "agnostic"):
        own = errors[errors["metric"] == f"{part}_error_centred"]
        by_set = own.groupby(["calibration", "seed"], observed=True)["value"].median()
        spread[part] = by_set.max() / by_set.min() if len(by_set) > 1 and by_set.min() > 0 else None
    if spread["specific"] and spread["agnostic"]:
        yield (
            f"The calibration sets with the largest and the smallest error differ by a factor of "
            f"{spread['specific']:.2f} in the language-specific part and {spread['agnostic']:.2f} in the "
            "language-agnostic part."
        )


def _errors_by_own_language(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Say which part of the states gains more by calibrating on the evaluated language."""
    rows = of_recipe(frames["contrasts"], {**recipe, "calibration": OWN, "other_calibration": OTHERS})
    of = rows.astype({"metric": str}).set_index("metric").to_dict("index")
    if "specific_minus_agnostic_db" in of:
        apart = of["specific_minus_agnostic_db"]
        yield (
            "Calibrating on the evaluated language changes the error of the language-specific part by "
            f"{of['specific_error_db']['value']:+.2f} dB and that of the language-agnostic part by "
            f"{of['agnostic_error_db']['value']:+.2f} dB relative to the other single languages (means over languages "
            f"and layers); the difference between the two is {apart['value']:+.2f} dB "
            f"{_interval(apart['low'], apart['high'])}({_permuted(apart)})."
        )


def _masks(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    coded = labels.quantized(recipe)
    unmasked = "Quantized models" if coded else "Models whose weights were all changed"
    overlap = of_recipe(frames["mask_overlap"], recipe)
    if labels.maskless(recipe):
        instead = "; the agreement of their codes is given instead" if len(overlap) else ""
        yield f"{unmasked} have no masks: there is no sparsity and no overlap of masks{instead}."
    if not len(overlap):
        return
    metric, masks = ("code_agreement", "Codes") if coded else ("iou", "Masks")
    verb, by = ("agree", "at a mean rate of") if coded else ("overlap", "with a mean IoU of")
    alike = f"{verb} {by}"
    iou, chance = _metric(overlap, metric), _metric(overlap, f"{metric}_chance")["value"].mean()
    same = (iou["calibration"].astype(str) == iou["other_calibration"].astype(str)).to_numpy()
    within, between, apart = mask_overlap.mean_overlaps(iou, metric)
    if same.any():
        shared = labels.common_text(mask_overlap.draws_share(iou))
        yield (
            f"{masks} from two draws of the same calibration set {alike} {_over_draws(within)} "
            f"(chance: {chance:.3f}; {shared})."
        )
    if not same.all():
        by_role = iou[~same].groupby("role", observed=True)["value"].mean()
        matrix = mask_overlap.set_matrix(iou[~same], metric)
        pairs = {(a, b): value for a, b in combinations(matrix.index, 2) if not np.isnan(value := matrix.loc[a, b])}
        most, least = max(pairs, key=pairs.__getitem__), min(pairs, key=pairs.__getitem__)
        yield (
            f"{masks} from different calibration sets {alike} {_over_draws(between)} "
            f"(chance: {chance:.3f}); the least stable role is {by_role.idxmin()} ({by_role.min():.3f}), the most "
            f"stable {by_role.idxmax()} ({by_role.max():.3f}). The most similar sets are {most[0]} and {most[1]} "
            f"({pairs[most]:.3f}), the least similar {least[0]} and {least[1]} ({pairs[least]:.3f})."
        )
    if np.isfinite(apart[1]):
        clearly = "more" if apart[1] > 0 else "less" if apart[2] < 0 else "neither clearly more nor clearly less"
        yield (
            f"Draws of one set {verb} {clearly} than draws of different sets: the difference is {_over_draws(apart)} "
            "(95 % jackknife interval over draws)."
        )


def _over_draws(estimate: tuple[float, float, float]) -> str:
    value, low, high = estimate
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")


def _neurons(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    checks = frames["neuron_selection"]
    if not len(checks):
        return
    own = of_recipe(checks, recipe).groupby("metric", observed=True)["value"].mean()
    dense = checks[checks["method"] == DENSE].groupby("metric", observed=True)["value"].mean()
    sets = of_recipe(frames["language_neurons"], recipe).groupby("metric", observed=True)["value"].sum()
    before = sets.get("kept", 0) + sets.get("lost", 0)
    if not before or "kept_share" not in own:
        return
    ceiling = ""
    if "other_half_share" in dense:
        ceiling = f"; split halves of the text in the dense model: {dense['other_half_share']:.0%}"
    yield (
        f"{own['kept_share']:.0%} of the dense model's language-specific neurons are selected again after pruning "
        f"(chance: {own['kept_by_chance']:.1%}{ceiling}), and {sets['still_firing'] / before:.0%} still fire above the "
        "dense model's threshold."
    )


def _questions(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    changes = of_recipe(frames["accuracy"], {**recipe, "part": ALL})
    metric = "twin_accuracy" if (changes["metric"] == "twin_accuracy").any() else "accuracy"
    changes = _metric(changes, f"{metric}_change")
    everywhere = changes[changes["language"].isna()]
    changes = everywhere if len(everywhere) else changes
    what = "Minimal-pair accuracy" if metric == "twin_accuracy" else "Accuracy"
    for task, rows in changes.groupby("task", observed=True):
        able = rows[~rows["at_chance"].astype(bool)]
        by_category = able.groupby("category", observed=True)["value"].mean()
        categories = labels.categories_of(rows)
        if len(able):
            listed = ", ".join(f"{c} {100 * by_category[c]:+.1f}" for c in categories if c in by_category.index)
            yield (f"{what} on {task} changes by {listed} (points, all languages together, means over models).")
        if guessed := [c for c in categories if c not in by_category.index]:
            yield (
                f"In {', '.join(guessed)} the dense model is not clearly above chance: what it cannot do, or is asked "
                "too few items to show, cannot be seen to be lost."
            )


def _between_categories(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Say what a category loses more than another, and whether calibrating on the own language depends on it."""
    rows = of_recipe(frames["task_contrasts"], {**recipe, "metric": "accuracy_drop", "part": ALL})
    for task, own in rows.groupby("task", observed=True):
        category = own[own["contrast"] == "category"]
        everywhere = category[category["language"].isna()]
        if len(category) and category["df"].isna().all() and len(everywhere):
            yield (
                f"Whether one category of {task} loses more than another cannot be tested: no calibration set was "
                "drawn with a second seed."
            )
        for row in everywhere[everywhere["df"].notna()].to_dict("records"):
            here = category[category["category"] == row["category"]]
            left = labels.in_order(here[here["at_chance"] & here["language"].notna()]["language"].unique())
            yield (
                f"{_compression([recipe])} costs {row['category']} {_points(row)} more than {row['other_category']} "
                f"(accuracy on {task}, mean over languages and calibration sets; {_significance(row)})."
                + (f" Left out, since the dense model is at chance: {', '.join(left)}." if left else "")
            )
        apart = own[(own["contrast"] == "own_by_category") & (own["calibration"] == OWN)]
        for row in apart.to_dict("records"):
            yield (
                f"Calibrating on the evaluated language changes the drop of {row['category']} by {_points(row)} more "
                f"than that of {row['other_category']} (accuracy on {task}; {_significance(row)}, permuting which set "
                "belongs to which language)."
            )


def _points(row: Mapping[Any, Any]) -> str:
    value, low, high = (100 * row[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} points" + (f" [{low:+.1f}, {high:+.1f}]" if np.isfinite(low) else "")


def _significance(row: Mapping[Any, Any]) -> str:
    """Say whether a difference is one; with a single draw of every set no difference is."""
    if np.isnan(row["df"]):
        return "one draw of each set: not tested"
    return f"{'' if row['p_adjusted'] < SIGNIFICANT else 'not '}significant, p = {row['p_adjusted']:.2g}"


_PARTS = (
    _text_matters,
    _questions,
    _between_categories,
    _where_the_damage_is,
    _errors_by_own_language,
    geometry_of_recipe,
    _masks,
    routing_of_recipe,
    lens_of_recipe,
    margins_of_recipe,
    _neurons,
)


def _own_language_best(rows: pd.DataFrame, *, lowest: bool) -> tuple[int, int]:
    """Count languages whose own calibration gives the best value (mean over seeds) among single-language sets."""
    languages = set(rows["language"].astype(str))
    single = rows[rows["calibration"].astype(str).isin(languages)]
    table = single.pivot_table(index="calibration", columns="language", values="value", observed=True)
    if len(table) < 2:
        return 0, 0
    best = table.idxmin() if lowest else table.idxmax()
    own = [lang for lang in table.columns if lang in table.index]
    return sum(best[lang] == lang for lang in own), len(own)


def _metric(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    return frame[frame["metric"] == metric]
