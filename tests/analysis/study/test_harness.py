from __future__ import annotations

import json
import sys

import pytest
import torch
from harness_tasks import jsonl, sums, write_task

from analysis.frames import read_frame, write_frame
from analysis.study.harness import STUDY_BENCHMARKS, bundled_task_folder, evaluate, known_tasks, preset
from probes import Item, Session, item_questions, score
from probes.items import ItemSource
from pruning import Recipe, prune
from pruning.errors import StudyError, TextError, VariantError
from pruning.text.sources import BUNDLED_LANGUAGES

STATES = {"twin": "1", "category": "reasoning", "kind": "state", "grade": 1, "choices": [" cold", " hot"]}
ITEMS = [
    {"id": "1a", **STATES, "prompt": "Ice is", "answer": 0},
    {"id": "1b", **STATES, "prompt": "Fire is", "answer": 1},
    {"id": "2", "category": "fluency", "prompt": "我们", "choices": ["走吧。", "走。", "ja"], "answer": 1},
]


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def harness():
    return pytest.importorskip("lm_eval")


@pytest.fixture
def source(tmp_path):
    for language in ("en", "sw"):
        jsonl(tmp_path / "items" / f"{language}.jsonl", ITEMS)
    return ItemSource(f"file:{tmp_path}/items/{{lang}}.jsonl")


@pytest.fixture
def folder(tmp_path):
    """Return a folder with tasks of several kinds."""
    folder = tmp_path / "tasks"
    sums(folder)
    said = [{"question": f"Say {word}:", "answer": word} for word in ("a", "b", "c")]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    generated = {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    }
    first = {"name": "first", "filter": [{"function": "take_first"}]}
    letter = [{"function": "regex", "regex_pattern": "([abc])"}, {"function": "take_first"}]
    either = {"name": "letter", "filter": letter}
    write_task(folder, "parrot_fr", said, metric_list=exact, filter_list=[first, either], **generated)
    bleu = [{"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}]
    write_task(folder, "translated", said, metric_list=bleu, **generated)
    (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": ["sums_sw", "parrot_fr"]}))
    return folder


def by_hand(model, tokenizer, context, continuation):
    """Sum the log-probabilities of the tokens that `continuation` adds to `context`."""
    before = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1)
    return sum(float(logits[0, place - 1, ids[0, place]]) for place in range(before, ids.shape[1]))


def scores(frame, model=None):
    """Return the log-likelihoods by item and choice."""
    shown = frame[(frame["metric"] == "log_likelihood") & (frame["method"] == (model or "dense"))]
    return {(row.item, int(row.choice)): row.value for row in shown.itertuples()}


def values(frame, metric):
    return {str(row.item): row.value for row in frame[frame["metric"] == metric].itertuples()}


@pytest.mark.usefixtures("harness")
def test_items_of_a_source_score_as_by_hand(model, tokenizer, source, tmp_path):
    names = bundled_task_folder(tmp_path / "tasks", ["en", "sw"], source)
    frame = evaluate(model, tokenizer, names, folders=[tmp_path / "tasks"], model_name="tiny")
    assert names == ["prunescope_en", "prunescope_sw"]
    assert set(frame["task"]) == set(names)
    assert set(frame["language"]) == {"en", "sw"}
    assert set(frame["model"]) == {"tiny"}
    english = frame[frame["language"] == "en"]
    for item in ITEMS:
        hand = [by_hand(model, tokenizer, item["prompt"], choice) for choice in item["choices"]]
        assert [scores(english)[item["id"], i] for i in range(len(hand))] == pytest.approx(hand, abs=1e-4)
        right = hand.pop(item["answer"])
        assert values(english, "margin")[item["id"]] == pytest.approx(right - max(hand), abs=1e-4)
        assert values(english, "correct")[item["id"]] == float(right > max(hand))
    assert set(english[english["item"] == "2"]["category"]) == {"fluency"}
    about = english.drop_duplicates("item").set_index("item")[["kind", "template", "grade", "twin"]]
    assert about.loc["1a"].to_dict() == {"kind": "state", "template": "1", "grade": 1, "twin": "1"}
    assert about.loc["2", "template"] == "2"
    assert about.loc["2", ["kind", "grade"]].isna().all()
    path = write_frame(tmp_path, "items", frame)
    assert scores(read_frame(path)[lambda read: read["language"] == "en"]) == scores(english)


@pytest.mark.usefixtures("harness")
def test_an_encoder_decoder_reads_the_prompt_and_is_scored_on_the_choice(
    make_model, tokenizer, source, folder, tmp_path
):
    """As the items are scored without the harness."""
    model = make_model("mt5")
    names = bundled_task_folder(tmp_path / "items_as_tasks", ["en"], source)
    read: list[int] = []
    frame = evaluate(model, tokenizer, names, folders=[tmp_path / "items_as_tasks"], progress=read.append)
    session = Session(model, tokenizer)
    expected = score(session, item_questions(session, [Item(**item) for item in ITEMS]))
    for item, values in zip(ITEMS, expected.values, strict=True):
        found = [scores(frame)[item["id"], i] for i in range(len(item["choices"]))]
        assert found == pytest.approx(values[: len(found)].tolist(), abs=1e-4)
    assert sum(read) > 0
    generated = evaluate(model, tokenizer, ["parrot_fr"], folders=[folder])
    assert set(generated["value"]) <= {0.0, 1.0}


@pytest.mark.usefixtures("harness")
def test_spaces_that_end_a_prompt_count_as_the_choices(model, tokenizer, tmp_path):
    jsonl(tmp_path / "items" / "en.jsonl", [{**ITEMS[0], "prompt": "Ice is ", "choices": ["cold", "hot"]}])
    names = bundled_task_folder(tmp_path / "tasks", ["en"], ItemSource(f"file:{tmp_path}/items/{{lang}}.jsonl"))
    frame = evaluate(model, tokenizer, names, folders=[tmp_path / "tasks"])
    assert scores(frame)["1a", 0] == pytest.approx(by_hand(model, tokenizer, "Ice is", " cold"), abs=1e-4)


@pytest.mark.usefixtures("harness")
def test_examples_come_before_the_item(model, tokenizer, folder):
    zero = evaluate(model, tokenizer, ["sums_sw"], folders=[folder])
    assert scores(zero)["0", 1] == pytest.approx(by_hand(model, tokenizer, "1 + 1 =", " 2"), abs=1e-4)
    two = evaluate(model, tokenizer, ["sums_sw"], folders=[folder], shots=2)
    assert scores(two).keys() == scores(zero).keys()
    assert scores(two) != scores(zero)
    assert scores(evaluate(model, tokenizer, ["sums_sw"], folders=[folder], shots=2)) == scores(two)
    solved = [f"{i} + {i} = {2 * i if i % 2 else i}" for i in range(1, 6)]
    prompts = [f"{a}\n\n{b}\n\n1 + 1 =" for a in solved for b in solved]
    likely = [by_hand(model, tokenizer, prompt, " 2") for prompt in prompts]
    assert min(abs(scores(two)["0", 1] - value) for value in likely) < 1e-4


@pytest.mark.usefixtures("harness")
def test_dense_and_pruned_answer_the_same_items_and_the_dense_weights_come_back(model, tokenizer, folder):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    variants = prune(model, tokenizer, [Recipe(method="magnitude", sparsity=s) for s in (0.5, 0.8)], name="tiny")
    read: list[int] = []
    frame = evaluate(
        model,
        tokenizer,
        ["sums_sw"],
        variants,
        folders=[folder],
        shots=1,
        limit=3,
        model_name="tiny",
        progress=read.append,
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    models = frame.groupby(["method", "sparsity"], observed=True)
    assert set(models.groups) == {("dense", 0.0), ("magnitude", 0.5), ("magnitude", 0.8)}
    keys = [list(zip(rows["item"], rows["choice"].fillna(-1), rows["metric"], strict=True)) for _, rows in models]
    assert keys[0] == keys[1] == keys[2]
    assert {item for item, _, _ in keys[0]} == {"0", "1", "2"}
    dense = scores(frame)
    assert dense == scores(evaluate(model, tokenizer, ["sums_sw"], folders=[folder], shots=1, limit=3))
    pruned = frame[frame["sparsity"] == 0.5]
    with variants[0].applied(model):
        own = evaluate(model, tokenizer, ["sums_sw"], folders=[folder], shots=1, limit=3)
    assert scores(pruned, "magnitude") == pytest.approx(scores(own), abs=1e-6)
    assert scores(pruned, "magnitude") != dense
    assert len(read) >= 3
    assert min(read) > 0


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("shots", [0, 1])
def test_generated_answers_are_right_or_wrong_by_the_last_filter(model, tokenizer, folder, shots):
    frame = evaluate(model, tokenizer, ["parrot_fr"], folders=[folder], shots=shots)
    assert list(frame["metric"]) == ["correct"] * 3
    assert frame["choice"].isna().all()
    assert set(frame["language"]) == {"fr"}
    assert set(frame["category"]) == {"parrot"}
    assert values(frame, "correct") == dict.fromkeys("012", 0.0)
    with torch.no_grad():  # a model that says nothing but "b"
        model.lm_head.weight.zero_()
        letter = tokenizer("b")["input_ids"][-1]
        model.lm_head.weight[letter] = 1
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(letter), 300).float())
    frame = evaluate(model, tokenizer, ["parrot_fr"], folders=[folder], shots=shots)
    assert values(frame, "correct") == {"0": 0.0, "1": 1.0, "2": 0.0}


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(("right", "metric"), [(1, "acc_mutual_info"), ([0, 2], "acc"), ("hot", "acc"), (1, "f1")])
def test_a_task_may_say_in_its_own_way_what_is_right(model, tokenizer, tmp_path, right, metric):
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in {"acc", metric}]
    if metric == "f1":  # without "acc", the margin tells
        metrics = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
    rows = [{"prompt": "Ice is", "words": ["cold", "hot", "frozen"], "right": right}]
    settings = {"doc_to_text": "prompt", "doc_to_choice": "words", "doc_to_target": "right", "metric_list": metrics}
    folder = write_task(tmp_path, "several", rows, output_type="multiple_choice", **settings)
    frame = evaluate(model, tokenizer, ["several"], folders=[folder])
    hand = [by_hand(model, tokenizer, "Ice is", f" {word}") for word in rows[0]["words"]]
    assert scores(frame) == pytest.approx({("0", i): value for i, value in enumerate(hand)}, abs=1e-4)
    margin = max(hand[0], hand[2]) - hand[1] if isinstance(right, list) else hand[1] - max(hand[0], hand[2])
    assert values(frame, "margin")["0"] == pytest.approx(margin, abs=1e-4)
    assert values(frame, "correct")["0"] == float(margin > 0)
    assert set(frame["language"]) == {"und"}
    assert len(frame) == 5


@pytest.mark.usefixtures("harness")
def test_choices_may_stand_before_what_is_scored(model, tokenizer, tmp_path):
    rows = [{"starts": ["Snow melts when", "Stones melt when"], "end": "it is warm", "right": 1}]
    settings = {"doc_to_text": "{{right}}", "doc_to_choice": "starts", "doc_to_target": "end"}
    folder = write_task(tmp_path, "starts", rows, output_type="multiple_choice", **settings)
    frame = evaluate(model, tokenizer, ["starts"], folders=[folder])
    hand = [by_hand(model, tokenizer, start, " it is warm") for start in rows[0]["starts"]]
    assert [scores(frame)["0", i] for i in range(2)] == pytest.approx(hand, abs=1e-4)
    assert values(frame, "margin")["0"] == pytest.approx(hand[1] - hand[0], abs=1e-4)
    assert values(frame, "correct")["0"] == float(hand[1] > hand[0])


@pytest.mark.usefixtures("harness")
def test_a_group_is_the_category_of_its_tasks(model, tokenizer, folder):
    frame = evaluate(model, tokenizer, ["both"], folders=[folder], limit=1, languages={"parrot_fr": "zh-hans"})
    assert set(zip(frame["task"], frame["category"], frame["language"], strict=True)) == {
        ("sums_sw", "both", "sw"),
        ("parrot_fr", "both", "zh-Hans"),
    }


@pytest.mark.usefixtures("harness")
def test_random_states_and_the_tokenizer_stay_as_they_were(model, tokenizer, folder):
    tokenizer.pad_token = None
    before = torch.get_rng_state()
    evaluate(model, tokenizer, ["sums_sw"], folders=[folder], limit=1)
    assert torch.equal(before, torch.get_rng_state())
    assert tokenizer.pad_token is None


@pytest.mark.usefixtures("harness")
def test_every_preset_task_is_in_the_installed_harness():
    known = set(known_tasks())
    for language in BUNDLED_LANGUAGES:
        names = preset(language)
        assert names == preset(language, known)
        assert len(names) >= 5
    assert sum(map(len, STUDY_BENCHMARKS.values())) == sum(len(preset(language)) for language in BUNDLED_LANGUAGES)
    with pytest.raises(StudyError, match=r'no preset tasks for Finnish \("fi"\) \(only for ar, de,'):
        preset("fi")


def refusal(*arguments, **settings):
    with pytest.raises(StudyError) as raised:
        evaluate(*arguments, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("harness")
def test_an_unknown_task_is_refused_with_the_closest_names(model, tokenizer, folder):
    message = refusal(model, tokenizer, ["belebele_swh_Lat"])
    assert 'has no task "belebele_swh_Lat"; did you mean "belebele_swh_Latn"?' in message
    assert len(message) < 300
    assert "lm-eval ls tasks" in refusal(model, tokenizer, ["???"])


@pytest.mark.usefixtures("harness")
def test_a_dataset_out_of_reach_is_refused(model, tokenizer):
    message = refusal(model, tokenizer, ["xnli_sw"])
    assert message.startswith('the data of task "xnli_sw" cannot be loaded (')
    assert "facebook/xnli" in message


@pytest.mark.usefixtures("harness")
def test_tasks_that_cannot_be_asked_are_refused(model, tokenizer, folder, tmp_path):
    assert refusal(model, tokenizer, [], folders=[folder]).startswith("nothing to evaluate")
    assert "limit of at least 1" in refusal(model, tokenizer, ["sums_sw"], folders=[folder], limit=0)
    missing = tmp_path / "nowhere"
    assert refusal(model, tokenizer, ["sums_sw"], folders=[missing]).startswith(f"there are no tasks in {missing};")
    assert 'task "translated" has no metric that marks each item as right or wrong (its metrics: bleu)' in refusal(
        model, tokenizer, ["translated"], folders=[folder]
    )
    assert 'task "sums_sw" cannot be run with 99 shots' in refusal(
        model, tokenizer, ["sums_sw"], folders=[folder], shots=99
    )


@pytest.mark.usefixtures("harness")
def test_a_variant_of_another_model_is_refused(make_model, tokenizer, folder):
    variants = prune(make_model(seed=1), tokenizer, Recipe(method="magnitude", sparsity=0.5), name="other")
    with pytest.raises(VariantError, match="belongs to another model"):
        evaluate(make_model(), tokenizer, ["sums_sw"], variants, folders=[folder], limit=1)


def test_a_missing_harness_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refusal(model, tokenizer, ["xnli_sw"])
    assert message.endswith("pip install 'prunescope[tasks]'")


def test_items_in_a_language_that_the_source_lacks_are_refused(source, tmp_path):
    with pytest.raises(TextError, match="no items for German"):
        bundled_task_folder(tmp_path / "tasks", ["de"], source)
    assert not (tmp_path / "tasks").exists()
