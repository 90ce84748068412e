"""What answers minimal pairs without understanding them: cues in the wording, for a gate over the bundled items.

A cue scores how well a choice fits a prompt. A pair is right by a cue if its two margins have a positive sum, as it is
for a model: a preference for one of the choices cancels.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from math import log

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from probes.items import Item

#: Characters of an n-gram.
ORDER = 5
FOLDS = 10
#: Cues that are learnt, from text or from other pairs.
LEARNT = ("n-grams", "words", "last sentence")
_SENTENCE = re.compile(r"(?<=[.!?。！？؟])\s*")
_BEFORE_CHINESE = re.compile(r"[\u4e00-\u9fff]|\w+")


def words(text: str) -> list[str]:
    """Words in lower case; Chinese characters."""
    return _BEFORE_CHINESE.findall(text.casefold())


def last_sentence(text: str) -> str:
    return [part for part in _SENTENCE.split(text) if part][-1]


@dataclass(frozen=True)
class Pair:
    """A minimal pair; `y` is 1 if the first item's answer is the first choice, else -1."""

    first: Item
    second: Item

    @property
    def y(self) -> int:
        return 1 - 2 * self.first.answer

    @cached_property
    def own(self) -> tuple[frozenset[str], frozenset[str]]:
        """The words of each choice that the other has not."""
        one, other = (frozenset(words(choice)) for choice in self.first.choices)
        return one - other, other - one


def pairs_of(items: Sequence[Item]) -> list[Pair]:
    twins: dict[str, list[Item]] = {}
    for item in items:
        twins.setdefault(item.twin, []).append(item)
    return [Pair(*two) for two in twins.values()]


def corpus_of(language: str) -> str:
    """The bundled text of a language."""
    lines = (files("pruning") / "text" / "corpus" / f"{language}.jsonl").read_text(encoding="utf-8").split("\n")
    return " ".join(json.loads(line)["text"] for line in lines if line)


# -- cues of a prompt and a choice: how well the choice fits -----------------------------------------------------------


def first_mention(prompt: str, pair: Pair, choice: int) -> float:
    found = [next((i for i, word in enumerate(words(prompt)) if word in own), None) for own in pair.own]
    there = [i for i in found if i is not None]
    return bool(there) and found[choice] == min(there)


def last_mention(prompt: str, pair: Pair, choice: int) -> float:
    found = [max((i for i, word in enumerate(words(prompt)) if word in own), default=-1) for own in pair.own]
    return found[choice] == max(found) >= 0


def repetition(prompt: str, pair: Pair, choice: int) -> float:
    return sum(word in pair.own[choice] for word in words(prompt))


def overlap(prompt: str, pair: Pair, choice: int) -> float:
    """Length of the longest string of the choice that the prompt has too."""
    there, text = prompt.casefold(), pair.first.choices[choice].strip(" .。").casefold()
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        found = any(text[i : i + middle] in there for i in range(len(text) - middle + 1))
        low, high = (middle, high) if found else (low, middle - 1)
    return low


def ngrams(text: str) -> Callable[[str, Pair, int], float]:
    """A model of characters, interpolated (Witten & Bell), trained on a text: log-likelihood of choices."""
    seen = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(ORDER + 1)]
    follow = [Counter(gram[:-1] for gram in seen[n]) for n in range(1, ORDER + 1)]  # kinds of next characters
    total = [Counter(text[i : i + n] for i in range(len(text) - n)) for n in range(ORDER)]
    alphabet = len(seen[1]) + 1

    def probability(context: str, char: str) -> float:
        found = 1 / alphabet
        for n in range(ORDER):
            before = context[len(context) - n :]
            kinds = follow[n][before]
            if len(before) < n or not kinds:
                break
            found = (seen[n + 1][before + char] + kinds * found) / (total[n][before] + kinds)
        return found

    def score(prompt: str, pair: Pair, choice: int) -> float:
        whole = prompt + pair.first.choices[choice]
        return sum(log(probability(whole[max(0, i - ORDER) : i], whole[i])) for i in range(len(prompt), len(whole)))

    return score


def outcomes(pairs: Sequence[Pair], cue: Callable[[str, Pair, int], float]) -> np.ndarray:
    """1 where the cue answers a pair right, -1 where wrong, 0 where it does not tell the answers apart."""
    found = []
    for pair in pairs:
        one, other = ([cue(item.prompt, pair, choice) for choice in (0, 1)] for item in (pair.first, pair.second))
        margin = pair.y * ((one[0] - one[1]) - (other[0] - other[1]))
        found.append(0 if abs(margin) < 1e-9 else int(np.sign(margin)))
    return np.array(found)


# -- cues that are learnt from other pairs ----------------------------------------------------------------------------


def learnt(pairs: Sequence[Pair], shorten: Callable[[str], str] = lambda prompt: prompt) -> np.ndarray:
    """Answers of a logistic regression on bags of words, cross-validated over pairs.

    What counts in a pair is only how words of the prompt go together with words of the choice, or with the choice that
    is mentioned first.
    """
    rows: list[dict[tuple[str, str], float]] = []
    for pair in pairs:
        one, other = (Counter(words(shorten(item.prompt))) for item in (pair.first, pair.second))
        one.subtract(other)
        chosen = Counter({word: side for side, own in zip((1, -1), pair.own, strict=True) for word in own})
        mentioned = [first_mention(shorten(pair.first.prompt), pair, choice) for choice in (0, 1)]
        chosen["<first>"] = int(np.sign(mentioned[0] - mentioned[1]))
        rows.append({(w, u): n * side for w, n in one.items() if n for u, side in chosen.items() if side})
    columns = {name: i for i, name in enumerate(dict.fromkeys(name for row in rows for name in row))}
    if not columns:
        return np.zeros(len(pairs), dtype=int)
    at = [(i, columns[name], value) for i, row in enumerate(rows) for name, value in row.items()]
    i, j, value = zip(*at, strict=True)
    x, y = csr_matrix((value, (i, j)), shape=(len(rows), len(columns))), np.array([pair.y for pair in pairs])
    fold = np.array([int(sha256(pair.first.twin.encode()).hexdigest(), 16) % FOLDS for pair in pairs])
    found = np.zeros(len(pairs), dtype=int)
    for number in set(fold):
        rest = fold != number
        # a pair and its mirror image, so that nothing but association is learnt
        both, labels = np.concatenate([x[rest].toarray(), -x[rest].toarray()]), np.concatenate([y[rest], -y[rest]])
        margin = LogisticRegression(fit_intercept=False).fit(both, labels).decision_function(x[~rest])
        found[~rest] = y[~rest] * np.where(np.abs(margin) < 1e-9, 0, np.sign(margin))
    return found


def all_cues(pairs: Sequence[Pair], corpus: str) -> dict[str, np.ndarray]:
    """The outcomes of every pair by every cue."""
    fixed = {"first mention": first_mention, "last mention": last_mention, "repetition": repetition, "overlap": overlap}
    return {
        **{name: outcomes(pairs, cue) for name, cue in fixed.items()},
        LEARNT[0]: outcomes(pairs, ngrams(corpus)),
        LEARNT[1]: learnt(pairs),
        LEARNT[2]: learnt(pairs, last_sentence),
    }


@dataclass(frozen=True)
class Rate:
    """How often a cue answers a group of pairs: pairs that it does not tell apart count as half."""

    group: str
    cue: str
    right: int
    wrong: int
    pairs: int

    @property
    def share(self) -> float:
        return 0.5 + (self.right - self.wrong) / (2 * self.pairs)

    @property
    def learnt(self) -> bool:
        return self.cue in LEARNT

    @property
    def p_value(self) -> float:
        """Of a binomial test. A learnt cue is one only if it answers right, since it is fitted to the other pairs."""
        told = self.right + self.wrong
        if not told:
            return 1.0
        side = "greater" if self.cue in LEARNT[1:] else "two-sided"
        return float(binomtest(self.right, told, alternative=side).pvalue)


def groups_of(pair: Pair) -> list[str]:
    """Category, kind and, of a generated item, template."""
    item = pair.first
    return [item.category, f"{item.category}: {item.kind}", *([item.template] if item.grade else [])]


def rates(pairs: Sequence[Pair], found: Mapping[str, np.ndarray]) -> Iterator[Rate]:
    """Yield the rate of every cue in every category, kind and template of generated items."""
    groups: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        for name in groups_of(pair):
            groups.setdefault(name, []).append(i)
    for group, members in groups.items():
        for cue, results in found.items():
            own = results[members]
            yield Rate(group, cue, int((own > 0).sum()), int((own < 0).sum()), len(own))


def failing(found: Sequence[Rate]) -> list[Rate]:
    """Return the rates that are not at chance at the 5 % level, corrected for their number (Bonferroni).

    Grammar may be local: what words or n-grams tell about it is no cue but what is tested.
    """
    asked = [
        rate for rate in found if rate.right + rate.wrong and not (rate.group.startswith("fluency") and rate.learnt)
    ]
    return [rate for rate in asked if rate.p_value * len(asked) < 0.05]
