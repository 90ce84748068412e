"""Draws of calibration text: what they take, what they share, and on what they do not depend."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel

from pruning import CalibrationSet, Corpus, Segment, text_source
from pruning.errors import TextError
from pruning.text.calibration import CalibrationText, Drawn, Pool, calibration_fingerprint, shared_text


@pytest.fixture(scope="module")
def corpus():
    source = text_source("bundled")
    return Corpus(source, source, source)


class Letters:
    """A tokenizer that makes a token of every letter, one that says where in the text it stands."""

    bos_token_id = None

    def __init__(self):
        self.read = 0

    def __call__(self, text, add_special_tokens=True):
        self.read += len(text)
        return {"input_ids": [self.read - len(text) + i for i in range(len(text))]}


def pool(tokens, length=1):
    """A text of that many tokens."""
    return Pool(Letters(), [Segment(str(i), "") for i in range(tokens)], "en", length)  # each has its end of line


def places(ranges):
    return {i for start, stop in ranges for i in range(start, stop)}


def drawn_rows(text, calibration):
    return [row for piece in text.pieces[calibration] for row in text.tokens[piece].tolist()]


# -- one draw -------------------------------------------------------------------------------------------------------


SIZES = st.integers(1, 300).flatmap(lambda there: st.tuples(st.just(there), st.integers(1, there)))


@given(SIZES, st.integers(0, 10_000))
def test_a_draw_takes_as_many_sequences_as_asked_and_none_twice(sizes, seed):
    there, samples = sizes
    ranges = pool(there).ranges(samples, seed)
    assert sum(stop - start for start, stop in ranges) == samples == len(places(ranges))
    assert places(ranges) <= set(range(there))


@given(SIZES, st.integers(0, 10_000), st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=4))
def test_a_draw_depends_on_no_other(sizes, seed, others):
    there, samples = sizes
    shared = pool(there)
    for size, other in others:
        if size <= there:
            shared.ranges(size, other)
    assert shared.ranges(samples, seed) == pool(there).ranges(samples, seed)


@given(SIZES, st.integers(0, 5))
def test_consecutive_draws_are_disjoint_while_the_text_lasts(sizes, lap):
    there, samples = sizes
    text, last = pool(there), there // samples
    draws = [places(text.ranges(samples, seed)) for seed in range(lap * last, (lap + 1) * last)]
    assert len(set.union(*draws)) == samples * last


@given(SIZES, st.integers(2, 30))
def test_draws_share_no_more_in_the_mean_than_random_ones_would(sizes, draws):
    there, samples = sizes
    drawn = [places(pool(there).ranges(samples, seed)) for seed in range(draws)]
    common = [len(one & other) / samples for one, other in combinations(drawn, 2)]
    assert sum(common) / len(common) <= samples / there + 0.05


def test_two_draws_of_more_than_half_the_text_have_as_little_in_common_as_can_be():
    one, other = (places(pool(48).ranges(32, seed)) for seed in (0, 1))
    assert len(one & other) == 2 * 32 - 48


def test_only_as_much_text_is_tokenized_as_draws_before_it_and_it_take():
    text = pool(1000, length=2)
    text.ranges(5, 0)
    assert len(text._tokens) == 10
    text.ranges(5, 3)
    assert len(text._tokens) == 40


def test_asking_for_more_tokens_than_there_are_says_how_many(corpus, tokenizer):
    segments = corpus.segments("calibration", "sw")
    available = sum(len(tokenizer(s.text + "\n")["input_ids"]) - 1 for s in segments)
    message = (
        rf"10000 samples of 64 tokens requested for Swahili .*has {available} tokens, enough for {available // 63}"
    )
    with pytest.raises(TextError, match=message):
        Pool(tokenizer, segments, "sw", 64).ranges(10_000, 0)


def test_sequences_start_with_bos(corpus, tokenizer):
    rows = Pool(tokenizer, corpus.segments("calibration", "en"), "en", 16)
    assert rows.ranges(4, 0) == ((0, 4),)
    rows = rows.sequences(0, 4)
    assert rows.shape == (4, 16)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert (rows[:, 1:] != tokenizer.bos_token_id).all()


def test_sequences_have_no_bos_where_the_tokenizer_puts_none(corpus, tokenizer):
    tokenizer.backend_tokenizer.post_processor = ByteLevel()
    rows = Pool(tokenizer, corpus.segments("calibration", "en"), "en", 16)
    rows.ranges(4, 0)
    assert (rows.sequences(0, 4) != tokenizer.bos_token_id).all()


# -- sets -----------------------------------------------------------------------------------------------------------


def test_sets_share_the_first_sequences_of_each_language(corpus, tokenizer):
    names = ("en+sw", "en", "sw")
    sets = {name: CalibrationSet.named(name, samples=5, length=16) for name in names}
    text = CalibrationText.draw(tokenizer, corpus, sets.values())
    drawn = {name: drawn_rows(text, chosen) for name, chosen in sets.items()}
    assert drawn["en+sw"] == drawn["en"][:3] + drawn["sw"][:2]
    assert text.pieces[sets["en"]][0] == text.pieces[sets["en+sw"]][0]


class Cached:
    """The tiny tokenizer, which reads every text once."""

    def __init__(self):
        plain = tiny_tokenizer()
        self.bos_token_id = plain.bos_token_id
        self.read = cache(lambda text, special: plain(text, add_special_tokens=special)["input_ids"])

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self.read(text, add_special_tokens)}


TOKENIZER = Cached()
NAMES = st.sampled_from(["en", "sw", "en+sw", "all"])
PLANS = st.tuples(NAMES, st.integers(3, 30), st.integers(0, 60))


def planned(name, samples, seed, length):
    languages = ("en", "sw", "zh")
    return CalibrationSet.named(name, all_languages=languages, samples=samples, length=length, seed=seed)


@settings(max_examples=25)
@given(st.lists(st.tuples(PLANS, st.sampled_from([128, 500])), min_size=1, max_size=5, unique=True))
def test_the_same_set_and_seed_is_the_same_text_in_any_study(corpus, plans):
    sets = [planned(*plan, length) for plan, length in plans]
    text = CalibrationText.draw(TOKENIZER, corpus, sets)
    for chosen in sets:
        alone = CalibrationText.draw(TOKENIZER, corpus, [chosen])
        assert sorted(drawn_rows(text, chosen)) == sorted(drawn_rows(alone, chosen))
        assert text.drawn[chosen] == alone.drawn[chosen]
        assert len(drawn_rows(text, chosen)) == chosen.samples


@settings(max_examples=25)
@given(PLANS, PLANS, st.sampled_from([128, 500]))
def test_what_is_shared_equals_a_count_token_by_token(corpus, one, other, length):
    one, other = planned(*one, length), planned(*other, length)
    text = CalibrationText.draw(TOKENIZER, corpus, [one, other])
    rows = [{tuple(row) for row in drawn_rows(text, chosen)} for chosen in (one, other)]
    share = shared_text(text.drawn[one], text.drawn[other])
    assert share == pytest.approx(len(rows[0] & rows[1]) / min(one.samples, other.samples))


def test_texts_of_other_pools_and_languages_share_nothing():
    one = Drawn(language="en", pool="a", tokens=((0, 100),))
    for language, pool_of_it in (("en", "b"), ("sw", "a")):
        assert shared_text([one], [Drawn(language=language, pool=pool_of_it, tokens=((0, 100),))]) == 0
    assert shared_text([one], [one.model_copy(update={"tokens": ((0, 50),)})]) == 1  # all of the smaller one


# -- items ----------------------------------------------------------------------------------------------------------


class Questions:
    """Items that no other text holds, many more in English than in Swahili."""

    def segments(self, category, language):
        number = {"en": 400, "sw": 40}[language]
        return [Segment(f"{i}", f"{category} {language} {i}: right") for i in range(number)]


@pytest.fixture(scope="module")
def asking(corpus):
    return Corpus(corpus.calibration, corpus.parallel, corpus.heldout, Questions())


def mixed(name, share, samples=6, seed=0, length=64):
    return CalibrationSet.named(name, samples=samples, length=length, seed=seed, items="logic", item_share=share)


@given(st.sampled_from(["en", "en+sw", "en+sw+zh+ar+de+es+fr"]), st.integers(7, 200), st.floats(0, 1))
def test_the_share_of_items_is_exact_and_even_over_languages(name, samples, share):
    if round(share * samples) in (0, samples) and share not in (0, 1):
        return
    chosen = CalibrationSet.named(name, samples=samples, items="logic", item_share=share)
    parts = chosen.parts()
    by_language = {language: sum(n for (of, _), n in parts.items() if of == language) for language in chosen.languages}
    assert by_language == chosen.shares()
    asked = {language: n for (language, items), n in parts.items() if items}
    assert abs(sum(asked.values()) - share * samples) <= 0.5
    assert all(abs(asked.get(lang, 0) - share * n) < 1 for lang, n in chosen.shares().items())


def test_without_a_share_a_set_is_the_plain_one(asking):
    plain = CalibrationSet.named("en+sw", samples=6, length=64)
    assert mixed("en+sw", 0.0) == plain
    assert calibration_fingerprint(asking, mixed("en+sw", 0.0)) == calibration_fingerprint(asking, plain)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_share_of_the_sequences_is_of_items_and_of_nothing_else(asking, tokenizer, share):
    plain, chosen = mixed("en+sw", 0.0), mixed("en+sw", share)
    text = CalibrationText.draw(tokenizer, asking, [plain, chosen])

    def sequences(segments, number):
        tokens = [token for s in segments for token in tokenizer(s.text + "\n", add_special_tokens=False)["input_ids"]]
        return [[tokenizer.bos_token_id, *tokens[i * 63 : (i + 1) * 63]] for i in range(number)]

    of_items = {"en": 2, "sw": 1} if share == 0.5 else {"en": 3, "sw": 3}
    expected = [row for lang, n in of_items.items() for row in sequences(asking.pool(lang, "logic"), n)]
    expected += [row for lang, n in of_items.items() for row in sequences(asking.pool(lang), 3 - n)]
    assert sorted(drawn_rows(text, chosen)) == sorted(expected)
    assert sorted(drawn_rows(text, plain)) == sorted(r for lang in of_items for r in sequences(asking.pool(lang), 3))
    assert {part.items for part in text.drawn[chosen]} == {"logic", *[""] * (share < 1)}


def test_draws_of_items_are_disjoint_while_they_last_and_say_what_they_share(asking, tokenizer):
    sets = [mixed("sw", 0.5, seed=seed) for seed in range(4)]
    text = CalibrationText.draw(tokenizer, asking, sets)
    there = len(asking.pool("sw", "logic"))
    assert there == 40
    drawn = [{tuple(row) for row in drawn_rows(text, chosen)} for chosen in sets]
    for one, other in combinations(range(4), 2):
        expected = len(drawn[one] & drawn[other]) / 6
        assert shared_text(text.drawn[sets[one]], text.drawn[sets[other]]) == pytest.approx(expected)
    available = sum(len(tokenizer(s.text + "\n")["input_ids"]) - 1 for s in asking.pool("sw", "logic")) // 63
    disjoint = available // 3
    assert 1 < disjoint < 5
    assert not set.intersection(*drawn[:disjoint])


def test_text_and_items_of_two_sets_are_shared_piece_by_piece(asking, tokenizer):
    one, other = mixed("en", 0.5, samples=4), mixed("en", 0.5, samples=8)
    text = CalibrationText.draw(tokenizer, asking, [one, other])
    assert set(text.pieces[one]) <= set(text.pieces[other])
    assert {piece.items for piece in text.pieces[one]} == {"", "logic"}


def test_mistakes_with_items_are_one_clear_line(asking, corpus, tokenizer):
    for share, message in (
        (1.5, "item_share 1.5 is not between 0 and 1"),
        (-0.1, "item_share -0.1 is not between 0 and 1"),
        (0.05, "item_share 0.05 of 6 samples is none of them; raise samples"),
        (0.95, "item_share 0.95 of 6 samples is all of them; raise samples"),
    ):
        with pytest.raises(ValueError, match=message):
            mixed("en", share)
    with pytest.raises(ValueError, match=r"item_share 0\.5 needs items, the category"):
        CalibrationSet.named("en", item_share=0.5)
    with pytest.raises(TextError, match=r"requested for Swahili .*, but its logic items have \d+ tokens, enough for"):
        CalibrationText.draw(tokenizer, asking, [mixed("sw", 1.0, samples=400)])
    with pytest.raises(TextError, match='calibration on "logic" items needs items'):
        CalibrationText.draw(tokenizer, corpus, [mixed("en", 0.5)])
