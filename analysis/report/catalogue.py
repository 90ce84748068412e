"""Every figure of a study: its section in the report, its name, its caption, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pruning.text.languages import named

from .. import plots
from ..frames import Frames, labels, recipes_of, series_of
from ..metrics import recovery
from ..metrics.components import AT_TOKENS
from ..metrics.maps import likeness
from ..metrics.recipe_contrasts import with_reference
from ..metrics.recovery_frame import named_causes
from ..metrics.together import DRAWS as TOGETHER_DRAWS
from ..metrics.together import TOGETHER
from .facts import ReportFacts, described_text
from .recipe_figures import GROUPS, OF_LENSES, RecipeFigures, sampled


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the report.

    Attributes
    ----------
    section
        Heading under which it stands.
    name
        Of its files, without ending.
    caption
        What was measured, on how much text, and how to read it.
    draw
        Makes the figure; takes settings of the plot, such as ``width``.
    kind
        What it shows: the name without recipe and task.
    what
        The recipe and the task that it is about.
    """

    section: str
    name: str
    caption: str
    draw: Callable[..., Figure]
    kind: str
    what: Mapping[str, Any] = field(default_factory=dict)


ALL_MODELS = "All models"
_PERPLEXITY, _LANGUAGES = "perplexity", "routing-languages"
_RECIPES, _RECIPES_ASKED = "recipes-perplexity", "recipes"
_RESPONSE, _BREAKING, _AT_PERPLEXITY = "dose-response", "dose-breaking", "accuracy-at-perplexity"
#: Lens to the kind of its figure.
_LENSES = {lens: f"{figure}-languages" for lens, figure in OF_LENSES.items()}
_COMPARED = (_RECIPES, _RECIPES_ASKED)
_DOSES = (_RESPONSE, _BREAKING, _AT_PERPLEXITY)
_OF_ALL_MODELS = (_PERPLEXITY, *_COMPARED, *_DOSES, _LANGUAGES, *_LENSES.values())
#: Every kind of figure of a study, in the order of the report.
KINDS = (*_OF_ALL_MODELS, *(kind for _, kinds in GROUPS.values() for kind in kinds))


def section_of(recipe: Mapping[str, Any]) -> str:
    """Return the heading of a recipe's section."""
    label = labels.recipe_label(recipe)
    return label[0].upper() + label[1:]


def study_figures(frames: Frames, facts: ReportFacts) -> Iterator[ReportFigure]:
    """Yield every figure that the frames have data for, in the order of the report."""
    yield from _of_all_models(frames, facts, _OF_ALL_MODELS)
    for recipe in recipes_of(frames["signal"]):
        own = RecipeFigures(frames, facts, recipe)
        for group in GROUPS:
            yield from _of_recipe(own, group)


def figures_of_kind(frames: Frames, facts: ReportFacts, kind: str) -> Iterator[ReportFigure]:
    """Yield the figures of one kind, of every recipe and task; only frames that they show or mention are touched."""
    yield from _of_all_models(frames, facts, (kind,))
    for group, (_, kinds) in GROUPS.items():
        for recipe in recipes_of(frames[group]) if kind in kinds else ():
            for figure in _of_recipe(RecipeFigures(frames, facts, recipe), group):
                if figure.kind == kind:
                    yield figure


def figures_of_group(frames: Frames, facts: ReportFacts | None, group: str) -> Iterator[ReportFigure]:
    """Yield the figures of every recipe that show one frame; those of masks need no facts, and no other frame."""
    for recipe in recipes_of(frames[group]):
        yield from _of_recipe(RecipeFigures(frames, facts, recipe), group)


def kinds_of_group(group: str) -> tuple[str, ...]:
    """Return the kinds of figures that show one frame."""
    return GROUPS[group][1]


def _of_all_models(frames: Frames, facts: ReportFacts, kinds: tuple[str, ...]) -> Iterator[ReportFigure]:
    text = (
        described_text(facts, labels.encoder_blocks(frames["signal"])) if {_PERPLEXITY, _LANGUAGES} & {*kinds} else ""
    )
    if _PERPLEXITY in kinds:
        yield ReportFigure(
            ALL_MODELS,
            _PERPLEXITY,
            f"Perplexity of every model in every language on {text}. Colour: log2 ratio to the dense model. "
            "Perplexities are not comparable between languages; bits per byte are.",
            lambda **settings: plots.perplexity.all_models(frames["perplexity"], **settings),
            _PERPLEXITY,
        )
    if {*_COMPARED} & {*kinds} and len(frames["recipe_contrasts"]):
        yield from (figure for figure in _of_recipes(frames["recipe_contrasts"]) if figure.kind in kinds)
    if {*_DOSES} & {*kinds} and len(frames["dose"]):
        yield from (figure for figure in _of_doses(frames) if figure.kind in kinds)
    if _LANGUAGES in kinds and (frames["routing"]["metric"] == "language_distance").any():
        yield ReportFigure(
            ALL_MODELS,
            _LANGUAGES,
            "Distance between languages by the experts they use in the dense model: total variation distance between "
            "the experts' shares of the top-k slots, mean over layers; 0: every expert equally often, 1: no expert in "
            f"common. Estimated without the bias of sampling noise. On {text}.",
            lambda **settings: plots.routing.languages(frames["routing"], **settings),
            _LANGUAGES,
        )
    for lens, kind in _LENSES.items():
        if kind in kinds and (frames["lens"]["lens"] == lens).any():
            yield _languages_of_tokens(frames, lens, kind)


def _of_recipes(frame: pd.DataFrame) -> Iterator[ReportFigure]:
    """Yield what every recipe keeps more or less than the reference."""
    _, reference = with_reference(frame)
    tested = (
        "Intervals (95 %) hold over draws of the calibration text and what was asked, paired by draw; with a single "
        "draw there are none, and nothing is tested. Filled markers: p < 0.05 (t-test, Benjamini-Hochberg correction). "
        "Frame recipe_contrasts has all pairs of recipes, and single calibration sets."
    )
    yield ReportFigure(
        ALL_MODELS,
        _RECIPES,
        f"Log perplexity of every recipe minus that of {reference}, on the calibration sets that both have; left of "
        f"zero is better. {tested}",
        lambda **settings: plots.recipe_contrasts.effects(frame, **settings),
        _RECIPES,
    )
    for task in frame.loc[frame["metric"] == "accuracy", "task"].unique():
        yield ReportFigure(
            ALL_MODELS,
            f"{_RECIPES_ASKED}-{labels.slug(str(task))}",
            f"Task {task}: accuracy (on minimal pairs, where there are any) of every recipe minus that of {reference}, "
            "on the calibration sets that both have, all languages in which the dense model is shown to be above "
            f"chance; right of zero is better. {tested}",
            lambda task=str(task), **settings: plots.recipe_contrasts.effects(
                frame, metric="accuracy", task=task, **settings
            ),
            _RECIPES_ASKED,
            {"task": str(task)},
        )


def _of_doses(frames: Frames) -> Iterator[ReportFigure]:
    """Yield what remains at which sparsity, of every series of variants that differ in sparsity alone."""
    for series in series_of(frames["dose"]):
        label, name = labels.recipe_label(series), labels.recipe_slug(series)
        yield ReportFigure(
            ALL_MODELS,
            f"{_RESPONSE}-{name}",
            f"{label}: perplexity and accuracy by sparsity, in which alone these variants differ. "
            "Text: log2 of the perplexity over the dense model's, mean over languages. Accuracy: over all languages "
            "(on minimal pairs, where there are any); categories in which the dense model is not shown to be above "
            "chance are left out. Lines: means over draws of a calibration set; bands: their range.",
            lambda series=series, **settings: plots.dose.response(
                frames["perplexity"], frames["accuracy"], series, **settings
            ),
            _RESPONSE,
            series,
        )
        yield ReportFigure(
            ALL_MODELS,
            f"{_BREAKING}-{name}",
            f"{label}: the sparsity at which a capability breaks, by calibration set and evaluation language. Text: "
            "perplexity has doubled. Others: accuracy has fallen half way from the dense model's to chance. "
            "Interpolated; –: not at any sparsity of these variants; grey: the dense model is not shown to be above "
            "chance. Below: 95 % bootstrap intervals over templates (text: segments), for one draw of the calibration "
            "text.",
            lambda series=series, **settings: plots.dose.breaking(frames["dose"], series, **settings),
            _BREAKING,
            series,
        )
    if len(frames["accuracy"]):
        yield ReportFigure(
            ALL_MODELS,
            _AT_PERPLEXITY,
            "Accuracy over all languages against perplexity (log2 over the dense model's, mean over languages): which "
            "method keeps more at the same perplexity. A line a method, from the dense model through its sparsities; "
            "means over calibration sets and draws.",
            lambda **settings: plots.dose.at_perplexity(frames["perplexity"], frames["accuracy"], **settings),
            _AT_PERPLEXITY,
        )


def _languages_of_tokens(frames: Frames, lens: str, kind: str) -> ReportFigure:
    encoder = labels.encoder_blocks(frames["signal"])
    return ReportFigure(
        ALL_MODELS,
        kind,
        f"Languages of the tokens that the dense model would predict after each block ({lens} lens): probability of "
        "tokens of each language, a panel a language of the text. A token is of the language that has two thirds or "
        "more of its frequency in the fitting text; the rest of the probability is on tokens that languages share, or "
        f"that do not occur there. Bands: 95 % bootstrap intervals over segments. {sampled(frames)}",
        lambda **settings: plots.lens.languages(frames["lens"], lens=lens, encoder=encoder, **settings),
        kind,
    )


def _of_recipe(own: RecipeFigures, group: str) -> Iterator[ReportFigure]:
    for drawn in own.of(group):
        words = [drawn.kind, *([labels.slug(drawn.task)] if drawn.task else []), labels.recipe_slug(own.recipe)]
        what = {**own.recipe, **({"task": drawn.task} if drawn.task else {})}
        yield ReportFigure(section_of(own.recipe), "-".join(words), drawn.caption, drawn.draw, drawn.kind, what)


def map_figures(
    frames: Mapping[str, pd.DataFrame], *, section: str, name: str, variant: str, category: str
) -> Iterator[ReportFigure]:
    """Yield the figure of several diagnoses that differ in language alone; none if their maps have nothing in common.

    Parameters
    ----------
    frames
        Language to the frame ``recovery``.
    section
        Heading under which it stands.
    name
        Of the diagnoses, as part of file names.
    variant, category
        What was diagnosed.
    """
    if likeness(frames):
        yield ReportFigure(
            section,
            f"diagnosis-languages-{name}",
            f"Is {variant} damaged in the same places in all languages ({category})? Spearman's ρ of "
            "what gradients estimate that each component recovers, in one language on the first half of its questions "
            "and in another on the second; both ways, averaged. Diagonal: a language with itself, which is the "
            "ceiling that the number of questions sets.",
            lambda **settings: plots.recovery.across(frames, **settings),
            "diagnosis-languages",
        )


def crossing_figures(
    frame: pd.DataFrame, *, section: str, name: str, variant: str, language: str, category: str
) -> Iterator[ReportFigure]:
    """Yield the figure of a diagnosis's frame ``crossing``; the parameters are those of :func:`diagnosis_figures`."""
    if not len(frame):
        return
    yield ReportFigure(
        section,
        f"diagnosis-crossing-{name}",
        f"Items asked in {named(language)} ({category}, n = {int(frame['n'].max())}), with the residual stream at the "
        "last token of the prompt replaced after one block by that of the item's twin, which has the opposite answer, "
        f"asked in each of several languages: in the dense model (left) and in {variant} (right), each with its own "
        "states. As a share of the way to the margin that the twin has in the language asked (½: as good as no answer; "
        "1: the twin's), or in nats where that is not significant. The same language is the ceiling. Dashed: states of "
        "items of other templates that have the twin's answer. Bands: 95 % intervals over templates.",
        lambda **settings: plots.crossing.crossing(frame, **settings),
        "diagnosis-crossing",
    )


def diagnosis_figures(
    frame: pd.DataFrame, *, section: str, name: str, variant: str, language: str, category: str
) -> Iterator[ReportFigure]:
    """Yield the figures of one diagnosis; none if nothing was lost.

    Parameters
    ----------
    frame
        Its frame ``recovery``.
    section
        Heading under which they stand.
    name
        Of the diagnosis, as part of file names.
    variant, language, category
        What was diagnosed.
    """
    if not len(recovery.importance(frame)):
        return
    asked = frame[frame["component"] == recovery.EVERYTHING]
    what = f"{category} in {named(language)}, n = {int(asked['n'].max())}"
    shares = plots.recovery.shares_known(frame)
    in_units = "in per cent of the drop" if shares else "in nats, since the drop is not significant"
    whole = "1: the whole drop is recovered." if shares else "In nats, since the drop is not significant."
    yield ReportFigure(
        section,
        f"diagnosis-curves-{name}",
        f"Recovery when the dense model's residual stream is patched into {variant} after one block ({what}): the "
        "whole stream, its language-specific part (LSAR, fitted on the dense model) and the language-agnostic rest, on "
        f"all questions. {whole} Bands: 95 % intervals over templates. Controls: 20 random "
        "subspaces with the specific part's rank and pruning error, their mean and range; patched exactly after the "
        "blocks where gradients give most effect to the specific part, or to what the block does to the agnostic part, "
        "and estimated from gradients after all.",
        lambda **settings: plots.recovery.curves(frame, **settings),
        "diagnosis-curves",
    )
    kinds = set(frame["component"].astype(str))
    at_tokens = frame[frame["component"].isin(AT_TOKENS) & (frame["metric"] == recovery.main_metric(frame, "restored"))]
    if len(at_tokens):
        yield ReportFigure(
            section,
            f"diagnosis-positions-{name}",
            f"Recovery when the dense model's residual stream is patched into {variant} after one block at some tokens "
            f"only ({category} in {named(language)}, n = {int(at_tokens['n'].max())} items of minimal pairs): those of "
            "the words in which the two prompts of a pair differ; the last token of the prompt, from which the choice "
            "is predicted, and those of a choice of several (in an encoder-decoder all that the decoder reads); all "
            f"others of the prompt. In grey, all tokens. {whole} Bands: 95 % intervals over templates.",
            lambda **settings: plots.recovery.positions(frame, **settings),
            "diagnosis-positions",
        )
    yield ReportFigure(
        section,
        f"diagnosis-map-{name}",
        f"What each role of each block recovers ({what}), {in_units}, estimated from gradients "
        "(attribution). Left: restoring the weights of that projection only. Right: restoring its output, which also "
        "undoes the damage in its input. Values need not add up to the whole drop.",
        lambda **settings: plots.recovery.heatmap(frame, **settings),
        "diagnosis-map",
    )
    if "head" in kinds:
        yield ReportFigure(
            section,
            f"diagnosis-heads-{name}",
            f"What restoring the output of each attention head recovers, before the heads are mixed ({what}), "
            f"{in_units}, estimated from gradients (attribution). With grouped keys and values these are the heads of "
            "queries.",
            lambda **settings: plots.recovery.heads(frame, **settings),
            "diagnosis-heads",
        )
    if TOGETHER in kinds:
        yield ReportFigure(
            section,
            f"diagnosis-together-{name}",
            f"What undoing the masks of 1, 2, 4, … projections together recovers ({what}): those that gradients rank "
            "highest on one half of the questions, on the other half, averaged over both. Band: 95 % interval over "
            f"templates. Controls: the same roles in blocks drawn at random, mean and range of {TOGETHER_DRAWS} draws. "
            "The last number is that of all masks.",
            lambda **settings: plots.recovery.together(frame, **settings),
            "diagnosis-together",
        )
    if not len(named_causes(frame)):
        return
    yield ReportFigure(
        section,
        f"diagnosis-causes-{name}",
        f"The most likely causes, patched exactly, one at a time ({what}), on the half of the questions that did not "
        "choose them, or averaged over both if both chose them. Left: restored from the dense model in the pruned one. "
        "Right: corrupted in the dense model with the pruned one's. Both as a share of the drop (in nats, if it is not "
        "significant on some of these questions), with 95 % intervals over templates.",
        lambda **settings: plots.recovery.causes(frame, **settings),
        "diagnosis-causes",
    )
