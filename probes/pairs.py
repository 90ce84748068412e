"""Which tokens of a prompt tell the two items of a minimal pair apart.

The two items have the same choices and opposite answers, so what decides between them stands in the words in which
their prompts differ, and has reached the last token of the prompt when the choice is predicted. A diagnosis restores
the stream at these tokens apart (:mod:`probes.patching`).
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import groupby

from .items import Item
from .scoring import Question, item_questions
from .session import Session

Span = tuple[int, int]
#: Beginnings of the names that Unicode gives to letters of scripts that do not separate words by spaces.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def paired_questions(session: Session, items: Sequence[Item]) -> list[Question]:
    """Return items as questions that know at which tokens they differ from their twins (:attr:`Question.differing`).

    An item differs from its twin in the tokens that have a character in what :func:`differing_spans` finds. From a
    tokenizer that does not say which characters its tokens are of, token ids are compared instead of words.

    Parameters
    ----------
    session, items
        As for :func:`probes.scoring.item_questions`. Those that share a ``twin`` with exactly one other are pairs.
    """
    twins = defaultdict(list)
    for item in items:
        twins[item.twin].append(item)
    found = []
    for item, question in zip(items, item_questions(session, items), strict=True):
        others = [other for other in twins[item.twin] if other is not item]
        if len(others) == 1:
            question = replace(question, differing=_differing_tokens(session, item.prompt, others[0].prompt))
        found.append(question)
    return found


def differing_spans(text: str, other: str) -> list[Span]:
    """Return the characters of the words in which a text differs from another, as spans of neighbouring words.

    A word is a run of letters, digits and their marks, a single letter in scripts without spaces between words, or any
    other character. Texts with equally many words are compared word by word if that leaves no more words differing than
    an alignment does (:class:`difflib.SequenceMatcher`), or if they have the same words in another order; others are
    aligned. A word that only the other text has leaves no span.

    >>> differing_spans("Ann saw Bob.", "Bob saw Ann."), differing_spans("He is not rich.", "He is rich.")
    ([(0, 3), (8, 11)], [(6, 9)])
    """
    spans, others = _words(text), _words(other)
    words, other_words = ([whole[a:b] for a, b in own] for whole, own in ((text, spans), (other, others)))
    differing = _differing(words, other_words)
    found = []
    for _, run in groupby(enumerate(differing), key=lambda each: each[1] - each[0]):
        first, *rest = (place for _, place in run)
        found.append((spans[first][0], spans[rest[-1] if rest else first][1]))
    return found


def _differing(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[int]:
    """Return the places of what differs in the first of two sequences."""
    matched = SequenceMatcher(None, first, second, autojunk=False).get_opcodes()
    aligned = [place for what, begin, stop, *_ in matched if what != "equal" for place in range(begin, stop)]
    if len(first) != len(second):
        return aligned
    in_place = [place for place, (own, other) in enumerate(zip(first, second, strict=True)) if own != other]
    reordered = Counter(first) == Counter(second)
    return in_place if reordered or len(in_place) <= len(aligned) else aligned


def _words(text: str) -> list[Span]:
    return list(_spans_of_words(text))


def _spans_of_words(text: str) -> Iterator[Span]:
    begin: int | None = None
    alone = False  # whether the word is one letter of a script without spaces, which only marks can follow
    for place, character in enumerate(text):
        kind = unicodedata.category(character)[0]
        unspaced = kind == "L" and unicodedata.name(character, "").startswith(_UNSPACED)
        if begin is not None and (kind not in "LNM" or (kind != "M" and (alone or unspaced))):
            yield begin, place
            begin = None
        if kind in "LNM":
            begin, alone = (place, unspaced) if begin is None else (begin, alone)
        elif not character.isspace():
            yield place, place + 1
    if begin is not None:
        yield begin, len(text)


def _differing_tokens(session: Session, prompt: str, other: str) -> tuple[int, ...]:
    """Return the positions of the tokens of a prompt at which it differs from another."""
    try:
        offsets = session.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    except NotImplementedError:  # from a tokenizer in Python
        own, theirs = (session.tokenizer(text)["input_ids"] for text in (prompt, other))
        return tuple(_differing(own, theirs))
    spans = differing_spans(prompt, other)
    return tuple(
        place
        for place, (begin, stop) in enumerate(offsets)
        if any(begin < end and start < stop for start, end in spans)
    )
