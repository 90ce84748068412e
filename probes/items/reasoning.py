"""Minimal pairs of reasoning, generated from the templates of a language.

A template is one of four structures. Its premises are the same in its three grades: the grade is the number of steps
that the question takes.

- ``chain``: six names in an order, in five shuffled sentences. The two that are compared lie 1, 2 or 3 apart, never at
  an end. The partner reverses every sentence.
- ``steps``: a number, and three changes to it; the question is for the number after 1, 2 or 3 of them. The partner
  reverses two changes that point in opposite directions; its answer is the wrong choice.
- ``rules``: two facts, and two rules for each of three levels, whose values are two; the question is for the value at
  level 1, 2 or 3. The partner swaps the facts.
- ``exceptions``: two people, what each of them lacks, and two rules for each of two levels; the question is for the
  person. The partner swaps what they lack.

The two prompts of a pair mention the same names and values in the same order and end on the same question. So nothing
that depends on where or how often a choice is mentioned, or on the question alone, tells its two answers apart. What
could do so together with the wording (which choice comes first, polarity, order of the premises) is counterbalanced by
design (:class:`_Balance`). The rest is shuffled by hash, equally in all languages: an id has the same premises in the
same order, and the same numbers, everywhere.
"""

from __future__ import annotations

import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, pairwise, product
from typing import Any, TypeVar

from .item import Item

GRADES = (1, 2, 3)
#: Pairs of a template in each grade.
PAIRS = 3
#: Fewest and most that a number of books, points or pages starts from, and the sizes of its changes.
_STARTS, _CHANGES = range(25, 70), range(2, 10)

Template = Mapping[str, Any]
T = TypeVar("T")


class Word(str):
    """A name or value in its basic form, ``{x}`` in a template; others are written ``{x.gen}``."""

    forms: Mapping[str, str]

    def __new__(cls, forms: Mapping[str, str] | str) -> Word:
        """Take its forms by name, the basic one under ``""``; or only that."""
        given = {"": forms} if isinstance(forms, str) else forms
        word = super().__new__(cls, given.get("", next(iter(given.values()))))
        word.forms = given
        return word

    def __getattr__(self, form: str) -> str:
        """Return another form."""
        try:
            return self.forms[form]
        except KeyError:
            raise AttributeError(f'"{self}" has no form "{form}"') from None


@dataclass(frozen=True)
class _Version:
    """One item of a pair."""

    premises: Sequence[str]
    question: str
    choices: tuple[str, str]
    answer: int


def reasoning_items(text: str) -> Iterator[Item]:
    """Yield the items of a language, from the text of its file of templates (TOML).

    The file lists names, ``[names]``, by gender, those of one group with equally many tokens, and ``[[template]]``:
    ``id``, ``kind``, ``structure``, ``gender`` of its names, an optional ``intro``, and the sentences that its
    structure asks for. ``between`` is what separates sentences, by default a space.
    """
    content = tomllib.loads(text)
    between = content.get("between", " ")
    names = {gender: Names(groups) for gender, groups in content["names"].items()}
    places = {template["structure"]: count() for template in content["template"]}
    for template in content["template"]:
        place = next(places[template["structure"]])
        supply = names[template["gender"]]
        for grade, number in product(GRADES, range(PAIRS)):
            twin = f"{template['id']}-{grade}-{number + 1}"
            versions = _STRUCTURES[template["structure"]](
                template, grade, _Balance.of(place, grade, number), supply, twin
            )
            for letter, version in zip("ab", versions, strict=True):
                said = [sentence for sentence in (template.get("intro", ""), *version.premises) if sentence]
                yield Item(
                    id=twin + letter,
                    twin=twin,
                    category="reasoning",
                    kind=template["kind"],
                    template=template["id"],
                    grade=grade,
                    prompt=between.join([*said, version.question]),
                    question=version.question,
                    choices=version.choices,
                    answer=version.answer,
                )


@dataclass(frozen=True)
class _Balance:
    """What is counterbalanced over the pairs of a template and grade, and over the templates of a structure.

    Attributes
    ----------
    number
        Of the pair, and of the template among those of its structure, for what takes turns.
    polarity
        Whether the question asks for more, not for less.
    order
        Whether the choice that is right if :attr:`polarity` holds, in the first item of the pair, is listed first.
    facts
        How the premises are ordered or phrased.
    """

    number: int
    polarity: bool
    order: bool
    facts: bool

    @classmethod
    def of(cls, place: int, grade: int, number: int) -> _Balance:
        """Return the setting of a pair: the second one opposite to the first, the third one half like either.

        Over eight templates every combination of the three factors is equally frequent in each grade; over four, the
        first two pairs have all of them, and the third one every combination of two.
        """
        turn = place + grade + (number == 2)
        chosen = _HALF[turn % 4]
        opposite = (number == 1) ^ (place // 4 % 2 == 1) ^ (number == 2 and grade == 2)
        return cls(place + number, *(factor ^ opposite for factor in chosen))


#: Half of all combinations of three factors, such that those of any two are equally frequent.
_HALF = [(False, False, False), (True, True, False), (True, False, True), (False, True, True)]


class Names:
    """Deals out names of one gender so that all are a choice about equally often.

    Parameters
    ----------
    groups
        Names with equally many tokens. The two names of a pair come from one group.
    """

    def __init__(self, groups: Iterable[Sequence[Mapping[str, str] | str]]) -> None:
        self._groups = [[Word(name) for name in group] for group in groups]
        self._all = [name for group in self._groups for name in group]
        self._round = count()
        self._left: deque[tuple[Word, Word]] = deque()

    def pair(self) -> tuple[Word, Word]:
        """Return the next two names; every one comes once before any comes again, each time with another partner."""
        if not self._left:
            number = next(self._round)
            self._left += [pair for group in self._groups for pair in _matched(group, number)]
        return self._left.popleft()

    def others(self, taken: Sequence[Word], number: int, key: str) -> list[Word]:
        """Return more names that are not among those `taken`."""
        return _shuffled([name for name in self._all if name not in taken], key)[:number]


def _matched(group: Sequence[T], number: int) -> Iterator[tuple[T, T]]:
    """Yield the games of one round of a round-robin tournament; of an odd group another member rests in each round."""
    even = [*group, *[None] * (len(group) % 2)]
    turn = number % max(len(even) - 1, 1)
    circle = [even[0], *even[1 + turn :], *even[1 : 1 + turn]]
    for one, other in zip(circle[: len(circle) // 2], reversed(circle), strict=False):
        if one is not None and other is not None:
            yield one, other


def _shuffled(values: Sequence[T], *key: object) -> list[T]:
    """Return values in an order that depends on the key alone, not on the version of Python."""
    return [value for _, value in sorted(enumerate(values), key=lambda at: sha256(f"{key} {at[0]}".encode()).digest())]


def _chain(t: Template, grade: int, balance: _Balance, names: Names, key: str) -> Iterator[_Version]:
    high, low = names.pair()
    ranked = names.others([high, low], 4, key)
    place = {1: 1 + balance.number % 3, 2: 1 + balance.number % 2, 3: 1}[grade]
    ranked.insert(place, high)
    ranked.insert(place + grade, low)
    # Each of the two is as often the subject of "more" as the other, and of "less".
    contrary = {place - 1, place + grade - 1} if grade > 1 else {0, 1, 2, 3, 4} - {place - 1, place, place + 1}
    links = _shuffled([(a, b, (i not in contrary) == balance.facts) for i, (a, b) in enumerate(pairwise(ranked))], key)
    first, second = (high, low) if balance.order else (low, high)
    question = t["ask_more" if balance.polarity else "ask_less"].format(x=first, y=second)
    for reversed_ in (False, True):
        premises = [
            t["more" if as_more != reversed_ else "less"].format(a=a if as_more else b, b=b if as_more else a)
            for a, b, as_more in links
        ]
        right = high if balance.polarity != reversed_ else low
        yield _Version(premises, question, _choices(t, x=(first, second)), int(right == second))


def _steps(t: Template, grade: int, balance: _Balance, names: Names, key: str) -> Iterator[_Version]:
    people = names.others([], 4, key)
    start, versions = _numbers(grade, balance, key)
    values = [start + sum(changes[:grade]) for changes in versions]
    listed = values if balance.order else values[::-1]
    choices = _choices(t, n=(str(listed[0]), str(listed[1])))
    for changes, value in zip(versions, values, strict=True):
        said = [
            t["more" if change > 0 else "less"].format(a=people[i], b=people[i + 1], n=abs(change))
            for i, change in enumerate(changes)
        ]
        premises = [t["start"].format(a=people[0], n=start), *(said if balance.facts else said[::-1])]
        yield _Version(premises, t["ask"].format(x=people[grade]), choices, listed.index(value))


def _numbers(grade: int, balance: _Balance, key: str) -> tuple[int, list[list[int]]]:
    """Return a number to start from, and three changes to it, with their signs, for either item of a pair.

    No answer is in the prompt or reached on the way, or next to such a number.
    """
    up, down = {1: (0, 2), 2: (0, 1), 3: (0, 2)}[grade]  # the two changes that the partner reverses
    for attempt in count():
        start = _shuffled(_STARTS, key, attempt)[0]
        changes = _shuffled(_CHANGES, key, attempt)[:3]
        if grade > 1 and (changes[up] > changes[down]) != balance.polarity:
            continue  # neither the first change nor the last one is always the larger of the two
        changes = [change if balance.number % 2 else -change for change in changes]
        changes[up], changes[down] = abs(changes[up]), -abs(changes[down])
        versions = [changes, [-change if i in (up, down) else change for i, change in enumerate(changes)]]
        reached = [[start + sum(own[:steps]) for steps in range(4)] for own in versions]
        answers = {values.pop(grade) for values in reached}
        said = {start, *map(abs, changes), *reached[0], *reached[1]}
        if not said & {value + by for value in answers for by in (-1, 0, 1)}:
            return start, versions
    raise AssertionError("unreachable")


def _rules(t: Template, grade: int, balance: _Balance, names: Names, key: str) -> Iterator[_Version]:
    asked, other = names.others([], 2, key)
    drawn = [_shuffled(_shuffled(groups, key, level)[0], key, level)[:2] for level, groups in enumerate(t["values"])]
    values = [[Word(value) for value in two] for two in drawn]
    rules = _shuffled(
        [
            t[f"rule{level}"].format(v=values[level - 1][side], w=values[level][side])
            for level, side in product((1, 2, 3), (0, 1))
        ],
        key,
    )
    listed = values[grade] if balance.order else values[grade][::-1]
    choices = _choices(t, str(grade), w=(listed[0], listed[1]))
    for side in (0, 1):
        facts = [t["fact"].format(x=asked, v=values[0][side]), t["fact"].format(x=other, v=values[0][1 - side])]
        if balance.polarity:
            facts.reverse()
        premises = [*facts, *rules] if balance.facts else [*rules, *facts]
        yield _Version(premises, t[f"ask{grade}"].format(x=asked), choices, listed.index(values[grade][side]))


def _exceptions(t: Template, grade: int, balance: _Balance, names: Names, key: str) -> Iterator[_Version]:
    x, y = names.pair()
    rules = _shuffled([t[f"rule{level}{side}"] for level in (2, 3) for side in "ab"], key)
    asked = "ab"[balance.polarity]
    listed = (x, y) if balance.order else (y, x)
    choices = _choices(t, x=listed)
    for lacks in ("ab", "ba"):
        facts = [t[f"lacks_{lacks[0]}"].format(x=x), t[f"lacks_{lacks[1]}"].format(x=y)]
        premises = [*facts, *rules] if balance.facts else [*rules, *facts]
        right = x if lacks[0] == asked else y
        yield _Version(premises, t[f"ask{grade}{asked}"], choices, listed.index(right))


def _choices(t: Template, which: str = "", **values: tuple[str, str]) -> tuple[str, str]:
    """Return the two choices, in which one field takes either value."""
    ((field, (one, other)),) = values.items()
    pattern = t.get("choice" + which, f" {{{field}}}.")
    return pattern.format(**{field: one}), pattern.format(**{field: other})


_STRUCTURES: Mapping[str, Callable[[Template, int, _Balance, Names, str], Iterator[_Version]]] = {
    "chain": _chain,
    "steps": _steps,
    "rules": _rules,
    "exceptions": _exceptions,
}
