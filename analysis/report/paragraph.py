"""A paragraph for a paper that says what was done, with the works to cite."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

from pruning import Recipe
from pruning.allocation import UNIFORM
from pruning.correction import NONE
from pruning.text.languages import language_name

from ..frames import Frames, labels
from .facts import ReportFacts, from_to
from .latex import escaped

#: What papers call the methods that have an entry of another name in ``references.bib``.
_WORKS = {"wanda-sp": "flap", "rtn": "gptq", "standardized": "flap", "fine-tune": "", "least-squares": "", "swaps": ""}
_CITED = re.compile(r" ?\[([a-z, -]+)\]")


def methods_paragraph(facts: ReportFacts, frames: Frames, diagnosed: bool) -> str:
    """Return the paragraph: plain text, with the keys of cited works in brackets.

    Parameters
    ----------
    facts, frames
        Of the study.
    diagnosed
        Whether variants were diagnosed.
    """
    return " ".join(sentence for part in _PARTS for sentence in part(facts, frames, diagnosed))


def methods_latex(paragraph: str, source: str) -> str:
    r"""Return the paragraph in LaTeX: what is in brackets becomes ``\cite``.

    >>> print(methods_latex("Read through nnsight [nnsight].", "Made here."), end="")
    % Made here. The works are in references.bib.
    Read through nnsight~\cite{nnsight}.
    """
    parts = _CITED.split(paragraph)
    written = [escaped(part) if i % 2 == 0 else f"~\\cite{{{part.replace(' ', '')}}}" for i, part in enumerate(parts)]
    return f"% {source} The works are in references.bib.\n{''.join(written)}\n"


def methods_plain(paragraph: str) -> str:
    """Return the paragraph without its citations, to be read.

    >>> methods_plain("Read through nnsight [nnsight].")
    'Read through nnsight.'
    """
    return _CITED.sub("", paragraph)


def references(paragraph: str) -> str:
    """Return the BibTeX entries of the works that the paragraph cites."""
    keys = {key.strip() for cited in _CITED.findall(paragraph) for key in cited.split(",")}
    return "".join(entry + "\n" for key, entry in _entries().items() if key in keys)


@cache
def _entries() -> Mapping[str, str]:
    lines = files("analysis.report").joinpath("references.bib").read_text(encoding="utf-8").splitlines()
    return {line[line.index("{") + 1 : line.index(",")]: line for line in lines if line.startswith("@")}


def _cited(*names: str) -> str:
    known = _entries()
    keys = [key for name in names if (key := _WORKS.get(name, name)) in known]
    return f" [{', '.join(dict.fromkeys(keys))}]" if keys else ""


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _made(facts: ReportFacts, frames: Frames, diagnosed: bool) -> Iterator[str]:
    by_kind = {
        "pruned": [recipe for recipe in facts.recipes if not recipe.quantizes],
        "quantized": [recipe for recipe in facts.recipes if recipe.quantizes],
    }
    for kind, recipes in by_kind.items():
        if recipes:
            yield f"{facts.model} ({facts.blocks} blocks) was {kind} with {_listed([_recipe(r) for r in recipes])}."
    if facts.imported:
        yield f"{len(facts.imported)} further variants of {facts.model} were made elsewhere."


def _recipe(recipe: Recipe) -> str:
    words = labels.method_name(recipe.method) + _cited(recipe.method)
    if recipe.quantizes:
        return f"{words} ({recipe.bits} bits, {f'groups of {recipe.group}' if recipe.group else 'one scale per row'})"
    pattern = recipe.pattern if ":" in recipe.pattern else f"per {recipe.pattern}"
    if recipe.choosing.structure:
        pattern = f"whole {recipe.pattern.replace('+', ' and ')}"
    details = [f"sparsity {recipe.sparsity:g}", pattern]
    if recipe.allocation != UNIFORM:
        details.append(f"{recipe.allocation} allocation{_cited(recipe.allocation)}")
    if recipe.subspaces is not None:
        details.append(f"language-specific part of the inputs (LSAR{_cited('lsar')}) weighted by {recipe.specific:g}")
    steps = {"refinement": recipe.refinement, "correction": recipe.correction, "fine-tuning": recipe.recover}
    details += [f"{name}: {labels.method_name(step)}{_cited(step)}" for name, step in steps.items() if step != NONE]
    return f"{words} ({', '.join(details)})"


def _calibrated(facts: ReportFacts, frames: Frames, diagnosed: bool) -> Iterator[str]:
    if not facts.sets or not any(recipe.calibrated for recipe in facts.recipes):
        return
    names = list(dict.fromkeys(one.name for one in facts.sets))
    draws = [len({one.seed for one in facts.sets if one.name == name}) for name in names]
    first = facts.sets[0]
    yield (
        f"Each calibration set ({_listed(names)}) has {first.samples} sequences of {first.length} tokens and was drawn "
        f"{_times(draws)}."
    )
    shares = sorted({one.item_share for one in facts.sets if one.item_share})
    if shares:
        categories = _listed(list(dict.fromkeys(one.items for one in facts.sets if one.items)))
        yield (
            f"Sets were also drawn with {_listed([labels.percent(share) for share in shares])} of their sequences from "
            f"{categories} items, as text with the right answer; the templates of these items are not among those that "
            "models were evaluated on."
        )


def _times(draws: Sequence[int]) -> str:
    number = from_to(draws)
    return "once" if number == "1" else f"{number} times"


def _evaluated(facts: ReportFacts, frames: Frames, diagnosed: bool) -> Iterator[str]:
    languages = _listed([language_name(language) for language in facts.languages])
    first = "left out, and so are special tokens" if facts.skip_first else "included"
    yield (
        f"All models were evaluated in {languages} on {facts.segments} held-out segments per language "
        f"({from_to(facts.heldout_tokens.values())} tokens) that share no text with calibration or fitting; the first "
        f"token of a segment is {first}."
    )


def _read(facts: ReportFacts, frames: Frames, diagnosed: bool) -> Iterator[str]:
    yield (
        "Activations were read through nnsight [nnsight]. Language-specific subspaces (LSAR [lsar], rank "
        f"{facts.rank}) were fitted on {facts.fit_segments} parallel segments per language; language-specific neurons "
        "were selected by LAPE [lape]."
    )
    if len(frames["geometry"]):
        yield "Representations were compared with linear CKA [cka]."
    tasks = set(frames["accuracy"]["task"].astype(str))
    if tasks - {"bundled"}:
        yield f"Tasks: {_listed(sorted(tasks))}."
    if "bundled" in tasks:
        yield "The bundled items are minimal pairs: two items with the same choices and opposite answers."


def _tested(facts: ReportFacts, frames: Frames, diagnosed: bool) -> Iterator[str]:
    if frames["contrasts"]["df"].notna().any():
        yield (
            "Differences between calibration sets have 95 % intervals from variance components over draws of the "
            "calibration text and segments, crossed [judd], and are corrected for multiple testing [benjamini]; "
            "whether a set suits its own language was tested by permuting whole sets."
        )
    else:
        yield "With a single draw of each calibration set, differences between sets were not tested."
    if diagnosed:
        yield (
            "Components were located by patching activations of the dense model into the variant [rome], chosen by "
            "attribution [attribution] on one half of the questions and measured on the other."
        )


def _versions(facts: ReportFacts, frames: Frames, diagnosed: bool) -> Iterator[str]:
    yield f"Software: {', '.join(f'{name} {number}' for name, number in facts.versions.items())}."


_PARTS = (_made, _calibrated, _evaluated, _read, _tested, _versions)
