from __future__ import annotations

import json
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes import ItemSource, Session, item_questions
from probes.items import CATEGORIES, Item, items_fingerprint, some_twins
from probes.items.bundled import bundled_items
from pruning.errors import TextError
from pruning.text.sources import BUNDLED_LANGUAGES

GOOD = {"id": "1a", "category": "reasoning", "prompt": "The sky is", "choices": [" blue", " green"], "answer": 0}


def twins_of(items):
    twins = {}
    for item in items:
        twins.setdefault(item.twin, []).append(item)
    return twins


# -- the bundled set ------------------------------------------------------------------------------------------------


def test_bundled_items_are_ready_at_once():
    """They are read and generated when they are first asked for, in all languages within a second."""
    bundled_items.cache_clear()
    start = time.process_time()
    found = {language: ItemSource().items(language) for language in BUNDLED_LANGUAGES}
    assert time.process_time() - start < 1
    found["en"].clear()
    assert ItemSource().items("en")  # the list is the caller's own


def test_languages_without_bundled_items_are_refused_with_a_way_out():
    with pytest.raises(TextError, match=r"no items for Korean.*the bundled set has ar, de.*file:FOLDER/\{lang\}.jsonl"):
        ItemSource().items("ko")


# -- items of one's own ---------------------------------------------------------------------------------------------


def written(folder, *lines):
    """A source whose English file has these lines: mappings, or text as it is."""
    (folder / "mine").mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "mine" / "en.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return ItemSource(f"file:{folder}/mine/{{lang}}.jsonl")


def test_items_of_a_file_are_read_as_they_are(tmp_path):
    twins = [GOOD | {"twin": "1"}, GOOD | {"id": "1b", "twin": "1", "answer": 1, "prompt": "Grass is"}]
    bare = {"id": 3, "prompt": "Two and two\u2028 make", "choices": ["4", "5", "22"], "answer": 0, "remark": "easy"}
    source = written(tmp_path, *twins, "", bare)
    items = source.items("en")
    assert source.task == "mine"
    assert [item.id for item in items] == ["1a", "1b", "3"]
    assert [item.twin for item in items] == ["1", "1", "3"]
    assert [item.category for item in items] == ["reasoning", "reasoning", "all"]
    assert items[1] == Item(**twins[1])
    assert items[2].prompt == bare["prompt"]  # a separator of lines in Unicode, none in JSON Lines
    assert items[2].choices == ("4", "5", "22")


def test_a_file_from_windows_is_read_too(tmp_path):
    source = written(tmp_path)
    content = "\r\n".join([json.dumps(GOOD), json.dumps(GOOD | {"id": "2"})]) + "\r\n"
    (tmp_path / "mine" / "en.jsonl").write_bytes(content.encode("utf-8-sig"))
    assert [item.id for item in source.items("en")] == ["1a", "2"]


def without(key):
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (GOOD | {"answer": 2}, r"line 2: no choice is correct: .answer. is 2, but there are only 2 choices"),
        (GOOD | {"answer": -1}, r"line 2: answer: .*greater than or equal to 0"),
        (GOOD | {"answer": None}, r"line 2: answer: .*integer"),
        (without("answer"), "line 2: answer: Field required"),
        (GOOD | {"choices": [" blue", " blue"]}, "line 2: two choices are the same, or one is empty"),
        (GOOD | {"choices": [" blue", ""]}, "line 2: two choices are the same, or one is empty"),
        (GOOD | {"choices": [" blue", "  "]}, "line 2: two choices are the same, or one is empty"),
        (GOOD | {"choices": [" blue"]}, r"line 2: choices: .*at least 2 items"),
        (GOOD | {"choices": " blue"}, r"line 2: choices: "),
        (without("prompt"), "line 2: prompt: Field required"),
        (without("id"), "line 2: id: Field required"),
        (GOOD | {"category": ""}, r"line 2: category: .*at least 1 character"),
        ('{"id": "1a", ', "line 2: not JSON .*write one item per line"),
        ("[1, 2]", "line 2: .*(dictionary|object)"),
        ("once upon a time", "line 2: not JSON .*write one item per line"),
        (GOOD, 'two items have the id "1a"; ids must be unique'),
    ],
)
def test_an_item_that_cannot_be_scored_is_one_clear_line(tmp_path, line, words):
    source = written(tmp_path, GOOD, line)
    with pytest.raises(TextError, match=words) as caught:
        source.items("en")
    assert str(tmp_path / "mine" / "en.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_without_items_are_one_clear_line(tmp_path):
    source = written(tmp_path, "", "")
    with pytest.raises(TextError, match=r"no items for English.*en.jsonl is empty"):
        source.items("en")
    with pytest.raises(TextError, match=r"no items for Swahili.*: there is no file .*sw.jsonl"):
        source.items("sw")
    (tmp_path / "mine" / "en.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(TextError, match=r"en.jsonl is not UTF-8; save it as UTF-8"):
        source.items("en")


@pytest.mark.parametrize(
    "spec", ["", "bundeld", "file:", "file:items.jsonl", "file:{lang}.txt", "hub:belebele", "items/{lang}.jsonl"]
)
def test_unknown_sources_are_refused(spec):
    with pytest.raises(TextError, match=r'unknown item source .*use "bundled" or "file:FOLDER/\{lang\}.jsonl"'):
        ItemSource(spec)


def test_numbers_are_good_ids(tmp_path):
    source = written(tmp_path, GOOD | {"id": 7}, GOOD | {"id": 8})
    assert [(item.id, item.twin) for item in source.items("en")] == [("7", "7"), ("8", "8")]
    with pytest.raises(TextError, match='two items have the id "7"'):
        written(tmp_path, GOOD | {"id": 7}, GOOD | {"id": "7"}).items("en")


def test_numbers_are_good_names_of_twins(tmp_path):
    source = written(tmp_path, GOOD | {"twin": 7}, GOOD | {"id": "1b", "twin": 7, "answer": 1})
    assert [item.twin for item in source.items("en")] == ["7", "7"]


@pytest.mark.parametrize(
    ("spec", "task"),
    [("bundled", "bundled"), ("file:a/riddles/{lang}.jsonl", "riddles"), ("file:{lang}.jsonl", "items")],
)
def test_a_source_says_what_its_task_is_called(spec, task):
    assert ItemSource(spec).task == task


def test_an_item_without_prompt_is_scored_from_the_beginning_of_text(model, tokenizer, tmp_path):
    """That takes a token which the tokenizer prepends."""
    (item,) = written(tmp_path, GOOD | {"prompt": ""}).items("en")

    class WithoutBeginning:
        def __call__(self, text, **settings):
            return {"input_ids": tokenizer(text, **settings)["input_ids"][1:]}

    session = Session(model, tokenizer)
    (question,) = item_questions(session, [item])
    assert {position for _, position, _, _ in question.targets} == set(range(max(map(len, question.rows))))
    session.tokenizer = WithoutBeginning()
    with pytest.raises(TextError, match='item "1a" has no token before its choices, and this tokenizer prepends none'):
        item_questions(session, [item])


# -- some of them ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(["knowledge", "reasoning"]), st.integers(0, 5)), max_size=30),
    st.one_of(st.none(), st.integers(1, 12)),
)
def test_some_twins_never_parts_twins_and_takes_about_as_many_as_asked(places, count):
    items = [
        Item(id=str(i), category=category, prompt="p", choices=("a", "b"), answer=0, twin=f"{category}{twin}")
        for i, (category, twin) in enumerate(places)
    ]
    chosen = some_twins(items, count)
    assert chosen == [item for item in items if item in chosen]
    taken = {item.twin for item in chosen}
    assert [item for item in items if item.twin in taken] == chosen
    for category in ("knowledge", "reasoning"):
        there = [item for item in items if item.category == category]
        kept = [item for item in chosen if item.category == category]
        if count is None or len(there) <= count:
            assert kept == there
        else:
            largest = max(len(twins) for twins in twins_of(kept).values())
            assert count <= len(kept) < count + largest


def test_a_number_for_each_category():
    items = ItemSource().items("en")
    chosen = some_twins(items, {"reasoning": 0, "fluency": 6})
    number = Counter(item.category for item in chosen)
    whole = Counter(item.category for item in items)
    assert number == {**{name: whole[name] for name in ("knowledge", "commonsense")}, "fluency": 6}
    assert chosen == [item for item in items if item in chosen]


@pytest.mark.parametrize("language", BUNDLED_LANGUAGES)
def test_a_sample_is_spread_over_kinds(language):
    for category in CATEGORIES:
        there = [item for item in ItemSource().items(language) if item.category == category]
        chosen = some_twins(there, 6)
        assert len(chosen) == 6
        assert len({item.kind for item in chosen}) == min(3, len({item.kind for item in there}))


def test_a_fingerprint_changes_with_everything_that_is_scored():
    item = Item(**GOOD)
    changes = [{"prompt": "x"}, {"answer": 1}, {"choices": (" blue", " red")}, {"category": "x"}, {"id": "x"}]
    prints = [items_fingerprint([Item(**GOOD | change)]) for change in changes]
    assert len({items_fingerprint([item]), items_fingerprint([item, item]), *prints}) == len(changes) + 2
    assert items_fingerprint([item]) == items_fingerprint([Item(**GOOD | {"twin": "1a", "remark": "none"})])


def test_half_a_character_in_an_item_is_one_line_with_its_place(tmp_path):
    item = {"id": "a", "category": "facts", "prompt": "half \ud83d", "choices": ["x", "y"], "answer": 0}
    (tmp_path / "en.jsonl").write_text(json.dumps(item) + "\n")
    with pytest.raises(TextError, match=r"en\.jsonl, line 1: \\ud83d is one half of a surrogate pair") as caught:
        ItemSource(f"file:{tmp_path}/{{lang}}.jsonl").items("en")
    assert "\n" not in str(caught.value)


# -- lines of published benchmarks ------------------------------------------------------------------------------------


TRUNK = {"option1": "The trunk", "option2": "the coat"}
WINOGRAD = [
    {"sentence": "The coat does not go into the trunk since _ is full.", **TRUNK, "answer": "1"},
    {"sentence": "The coat does not go into the trunk since _ is big.", **TRUNK, "answer": "2"},
    {"sentence": "Nina called Vera because _ was lonely.", "option1": "Nina", "option2": "Vera", "answer": 1},
    {"sentence": "_ was lonely, so Rosa came.", "option1": "Nina", "option2": "Vera", "answer": "2", "qID": "x-1"},
]


def test_sentences_with_a_gap_become_minimal_pairs_with_their_neighbours(tmp_path):
    items = written(tmp_path, *WINOGRAD).items("en")
    assert [(item.id, item.twin) for item in items] == [("1", "1"), ("2", "1"), ("3", "3"), ("x-1", "3")]
    assert {item.category for item in items} == {"coreference"}
    assert [item.answer for item in items] == [0, 1, 0, 1]
    assert items[0].prompt == items[1].prompt == "The coat does not go into the trunk since"
    assert items[0].choices == (" The trunk is full.", " the coat is full.")
    assert items[1].choices == (" The trunk is big.", " the coat is big.")
    assert items[3].prompt == ""  # the gap comes first
    assert items[3].choices == ("Nina was lonely, so Rosa came.", "Vera was lonely, so Rosa came.")


def test_neighbours_with_other_options_or_the_same_answer_are_no_pair(tmp_path):
    again = WINOGRAD[0] | {"sentence": "The coat goes into the trunk since _ is empty."}
    items = written(tmp_path, WINOGRAD[0], again, WINOGRAD[2]).items("en")
    assert [item.twin for item in items] == ["1", "2", "3"]
    three = written(tmp_path, *WINOGRAD[:2], WINOGRAD[0]).items("en")
    assert [item.twin for item in three] == ["1", "1", "3"]  # a pair has two


COPA = {"premise": "The lamp went out.", "choice1": "The bulb broke.", "choice2": "It rained.", "label": 0, "idx": 4}


def test_premises_are_joined_to_causes_and_effects_by_a_conjunction(tmp_path):
    lines = [COPA | {"question": "cause"}, COPA | {"question": "effect", "label": 1, "idx": 5}]
    cause, effect = written(tmp_path, *lines).items("en")
    assert (cause.id, cause.twin, cause.category, cause.kind, cause.answer) == ("4", "4", "commonsense", "cause", 0)
    assert (cause.prompt, cause.choices) == ("The lamp went out because", (" the bulb broke.", " it rained."))
    assert (effect.prompt, effect.answer, effect.kind) == ("The lamp went out so", 1, "effect")
    (own,) = written(tmp_path, COPA | {"question": "cause", "choice1": "I broke it.", "choice2": "Ice fell."}).items(
        "en"
    )
    assert own.choices == (" I broke it.", " ice fell.")


@pytest.mark.parametrize(
    ("language", "prompt", "choice"),
    [
        ("zh", "灯灭了，因为", "灯泡坏了。"),
        ("sw", "灯灭了 kwa sababu", " 灯泡坏了。"),
        ("de", "灯灭了。", " 灯泡坏了。"),
    ],
)
def test_a_conjunction_is_that_of_the_language_where_clauses_stay_as_they_are(tmp_path, language, prompt, choice):
    line = {"premise": "灯灭了。", "choice1": "灯泡坏了。", "choice2": "下雨了。", "question": "cause", "label": 0}
    (tmp_path / f"{language}.jsonl").write_text(json.dumps(line), encoding="utf-8")
    (item,) = ItemSource(f"file:{tmp_path}/{{lang}}.jsonl").items(language)
    assert (item.id, item.prompt, item.choices[0]) == ("1", prompt, choice)


@pytest.mark.parametrize(
    ("good", "bad", "prompt", "choices"),
    [
        ("The cats near me sleep.", "The cats near me sleeps.", "The cats near me", (" sleep.", " sleeps.")),
        ("The cats sleep.", "The cats sleep soundly.", "The cats", (" sleep.", " sleep soundly.")),
        ("Many cats sleep.", "Much cats sleep.", "", ("Many cats sleep.", "Much cats sleep.")),
        ("He left", "He left early", "He", (" left", " left early")),
        ("这只猫睡了。", "这条猫睡了。", "这", ("只猫睡了。", "条猫睡了。")),
    ],
)
def test_two_sentences_are_compared_from_the_first_word_that_differs(tmp_path, good, bad, prompt, choices):
    line = {"sentence_good": good, "sentence_bad": bad, "UID": "agreement", "pairID": "7", "linguistics_term": "number"}
    (item,) = written(tmp_path, line).items("en")
    assert (item.prompt, item.choices, item.answer) == (prompt, choices, 0)
    assert (item.id, item.twin, item.category, item.kind) == ("agreement-7", "agreement-7", "fluency", "number")
    assert item.template == "agreement"
    (bare,) = written(tmp_path, {"sentence_good": good, "sentence_bad": bad}).items("en")
    assert (bare.id, bare.template) == ("1", "1")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (WINOGRAD[0] | {"sentence": "No gap."}, 'line 2: sentence: there should be one "_" for the options, not 0'),
        (WINOGRAD[0] | {"sentence": "_ and _."}, 'line 2: sentence: there should be one "_" for the options, not 2'),
        (WINOGRAD[0] | {"answer": "3"}, "line 2: answer: .*less than or equal to 2"),
        (WINOGRAD[0] | {"option2": "The trunk"}, "line 2: two choices are the same"),
        (COPA | {"question": "why"}, "line 2: question: .*'cause' or 'effect'"),
        (COPA | {"question": "cause", "label": 2}, "line 2: label: .*less than or equal to 1"),
        ({"sentence_good": "Same.", "sentence_bad": "Same."}, "line 2: the two sentences are the same"),
        ({"sentence_good": "Same.", "sentence_bad": ""}, "line 2: sentence_bad: .*at least 1 character"),
    ],
)
def test_a_line_of_a_benchmark_that_cannot_be_scored_is_one_clear_line(tmp_path, line, words):
    with pytest.raises(TextError, match=words) as caught:
        written(tmp_path, GOOD, line).items("en")
    assert "\n" not in str(caught.value)
