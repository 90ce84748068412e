"""The words, and the tokens, in which the two items of a minimal pair differ."""

from __future__ import annotations

from collections import defaultdict

import pytest
from conftest import tiny_tokenizer

from probes import Session, item_questions, paired_questions
from probes.items import Item
from probes.items.bundled import bundled_items
from probes.pairs import differing_spans
from pruning.text.sources import BUNDLED_LANGUAGES


def words_of(text, other):
    return [text[begin:stop] for begin, stop in differing_spans(text, other)]


@pytest.mark.parametrize(
    ("text", "other", "own", "others"),
    [
        ("The cat sat on the mat", "The dog sat on the mat", ["cat"], ["dog"]),
        ("Maria gave Anna a book.", "Anna gave Maria a book.", ["Maria", "Anna"], ["Anna", "Maria"]),
        ("Ann is older than Eve. Eve is", "Ann is younger than Eve. Eve is", ["older"], ["younger"]),
        # an alignment would find the first "older than Eve. Eve is younger" moved, and call twelve words different
        (
            "Ann is older than Eve. Eve is older than Sue. Sue is",
            "Ann is younger than Eve. Eve is younger than Sue. Sue is",
            ["older", "older"],
            ["younger", "younger"],
        ),
        ("He is not rich, and he", "He is rich, and he", ["not"], []),
        ("She put it away", "She put the two big ones away", ["it"], ["the two big ones"]),
        ("王芳比李艳年长。谁", "李艳比王芳年长。谁", ["王芳", "李艳"], ["李艳", "王芳"]),
        ("他昨天去了北京", "他昨天没有去北京", ["了"], ["没有"]),
        ("هيثم أقصر من عماد.", "هيثم أطول من عماد.", ["أقصر"], ["أطول"]),
        ("كَتَبَ الولد", "كُتُبٌ الولد", ["كَتَبَ"], ["كُتُبٌ"]),  # marks are part of a word
        ("เขาไปตลาด", "เขามาตลาด", ["ไป"], ["มา"]),
        ("alike", "alike", [], []),
        ("", "all", [], ["all"]),
    ],
)
def test_words_differ_where_a_reader_sees_it(text, other, own, others):
    assert words_of(text, other) == own
    assert words_of(other, text) == others


@pytest.mark.parametrize("language", BUNDLED_LANGUAGES)
def test_hardly_a_bundled_item_has_no_word_that_its_twin_lacks(language):
    pairs = defaultdict(list)
    for item in bundled_items(language):
        pairs[item.twin].append(item.prompt)
    found = [words_of(*pair) for own in pairs.values() for pair in (own, own[::-1])]
    assert len(found) == len(bundled_items(language))
    assert sum(not words for words in found) < len(found) / 50


ITEMS = [
    Item(id="1a", twin="1", prompt="Ein Käfer, 我们 ja", choices=("!", "?!"), answer=0),
    Item(id="1b", twin="1", prompt="Ein Vogel, 他们 ja", choices=("!", "?!"), answer=1),
    Item(id="2", prompt="Ein Käfer, 我们 ja", choices=("!", "?!"), answer=0),
    Item(id="3a", twin="3", prompt="Ja, so", choices=("!", "?!"), answer=0),
    Item(id="3b", twin="3", prompt="Ja, so was", choices=("!", "?!"), answer=1),
    *(Item(id=f"4{x}", twin="4", prompt=f"Ja {x}", choices=("!", "?!"), answer=0) for x in "abc"),
]


class InPython:
    """A tokenizer that does not know which characters its tokens are of."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, return_offsets_mapping=False, **settings):
        if return_offsets_mapping:
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")
        return self.tokenizer(text, **settings)


def test_tokens_differ_whose_characters_do(model, tokenizer):
    """A token is a byte, after BOS."""
    questions = paired_questions(Session(model, tokenizer), ITEMS)
    before = len(b"Ein ") + 1
    first, second = len("Käfer".encode()), len("Käfer, ".encode()) + before
    assert questions[0].differing == (*range(before, before + first), *range(second, second + 3))
    second = len(b"Vogel, ") + before
    assert questions[1].differing == (*range(before, before + 5), *range(second, second + 3))
    assert questions[2].differing is None
    assert questions[3].differing == ()
    assert questions[4].differing == tuple(range(len(b"Ja, so ") + 1, len(b"Ja, so was") + 1))
    assert [question.differing for question in questions[5:]] == [None] * 3  # three items are no pair


def test_token_ids_are_compared_where_characters_are_unknown(model):
    questions = paired_questions(Session(model, InPython(tiny_tokenizer())), ITEMS)
    assert questions[4].differing == tuple(range(len(b"Ja, so") + 1, len(b"Ja, so was") + 1))
    assert questions[3].differing == ()
    before = len(b"Ein ") + 1
    assert set(range(before, before + len("Käf".encode()))) <= set(questions[0].differing)
    assert max(questions[0].differing) < len("Ein Käfer, 我".encode()) + 1


def test_what_a_question_asks_does_not_depend_on_its_twin(model, tokenizer):
    session = Session(model, tokenizer)
    for plain, paired in zip(item_questions(session, ITEMS), paired_questions(session, ITEMS), strict=True):
        assert (plain.rows, plain.targets, plain.answer) == (paired.rows, paired.targets, paired.answer)
