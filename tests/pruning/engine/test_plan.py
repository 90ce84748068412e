"""What a grid will need is told before it starts, and is about what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import CORPUS, SHORT, checkpoint, saved

from pruning import Anatomy, CalibrationSet, Recipe, load_model, prune
from pruning.engine import Job, planned_jobs
from pruning.engine.jobs import covered_shapes
from pruning.engine.plan import MemoryCapError, Plan, _Needs, make_plan
from pruning.text.calibration import CalibrationText

WANDA, MAGNITUDE = Recipe(method="wanda", sparsity=0.5), Recipe(method="magnitude", sparsity=0.5)
SPARSEGPT, SNIP = Recipe(method="sparsegpt", sparsity=0.5), Recipe(method="snip", sparsity=0.5)
LONG = [CalibrationSet.named(name, samples=64, length=32) for name in ("en", "sw", "en+sw", "zh")]


@pytest.fixture
def anatomy(make_model):
    return Anatomy(make_model())


def planned(anatomy, tokenizer, recipes, sets=(SHORT,), **settings) -> Plan:
    jobs = planned_jobs(recipes, sets)
    return make_plan(anatomy, jobs, CalibrationText.draw(tokenizer, CORPUS, sets), **settings)


def test_memory_grows_with_the_jobs_and_what_they_do(anatomy, tokenizer):
    one = planned(anatomy, tokenizer, [WANDA], LONG[:1]).memory
    text = planned(anatomy, tokenizer, [WANDA], LONG).memory
    recipes = planned(anatomy, tokenizer, [WANDA, WANDA.model_copy(update={"sparsity": 0.3})], LONG).memory
    solved = planned(anatomy, tokenizer, [WANDA, SPARSEGPT], LONG).memory
    assert one < text < recipes < solved
    assert planned(anatomy, tokenizer, [MAGNITUDE]).memory < one


def test_a_cap_keeps_states_on_disk_and_cuts_into_waves(anatomy, tokenizer):
    recipes = [Recipe(method="sparsegpt", sparsity=s / 10) for s in range(3, 7)]
    plan = free = planned(anatomy, tokenizer, recipes, LONG[:2])
    assert (len(free.waves), free.states) == (1, "device")
    waves = []
    with pytest.raises(MemoryCapError):
        while True:
            cap = plan.memory - 1
            plan = planned(anatomy, tokenizer, recipes, LONG[:2], memory=cap)
            assert plan.states == "disk"
            assert plan.memory <= cap
            assert [job for wave in plan.waves for job in wave] == list(free.waves[0])
            waves.append(len(plan.waves))
    assert waves == sorted(set(waves))  # fewer jobs at a time, the less memory there is
    assert waves[-1] == 2  # the recipes of a set share its statistics: fewer at a time would need no less


def test_factors_of_gram_matrices_count_for_every_set_and_once_for_recipes_that_share_them(anatomy, tokenizer):
    dense = {"propagation": "dense"}
    sparsegpt = Recipe(method="sparsegpt", sparsity=0.5, **dense)
    awq, gptq, damped, ordered = (
        Recipe(method=method, bits=4, group=8, parameters=parameters, **dense)
        for method, parameters in (("awq", {}), ("gptq", {}), ("gptq", {"damping": 0.1}), ("gptq", {"order": 1}))
    )
    grams = sum(4 * anatomy.shape(0, group.leader)[1] ** 2 for group in anatomy.groups(0))
    none = planned(anatomy, tokenizer, [awq], LONG[:2]).memory
    for recipes, factors in (
        ([sparsegpt], 1),
        ([gptq], 1),
        ([sparsegpt, gptq, awq], 1),
        ([sparsegpt, damped], 2),
        ([gptq, damped, ordered], 3),
    ):
        memory = planned(anatomy, tokenizer, recipes, LONG[:2]).memory
        assert memory - none == pytest.approx(1.4 * 2 * factors * grams, abs=2)  # of two sets


def test_spectra_take_memory_and_time_once(anatomy, monkeypatch):
    monkeypatch.setattr(_Needs, "seconds_to_load_and_choose", lambda self: (0.0, 0.0))
    alpha = [Recipe(method="magnitude", sparsity=s, allocation="alpha") for s in (0.4, 0.5)]
    one, two, none = (
        make_plan(anatomy, [Job(r) for r in recipes], None) for recipes in (alpha[:1], alpha, [MAGNITUDE])
    )
    assert none.seconds_a_block == 0
    assert 0 < two.seconds_a_block < 1.9 * one.seconds_a_block
    assert one.memory - none.memory == pytest.approx(1.4 * 2 * 8 * 32**2, abs=2)  # two float64 matrices of 32 inputs


def test_the_search_of_awq_counts_for_every_recipe(anatomy, tokenizer, monkeypatch):
    """40 · outputs · inputs² operations a matrix, two to a multiply-add (docs/pruning.md)."""
    gptq, *awq = (Recipe(method=m, bits=b, group=8) for m, b in (("gptq", 4), ("awq", 4), ("awq", 3)))
    block = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    searched = sum(20 * out * inputs**2 for out, inputs in block) / sum(out * inputs for out, inputs in block)
    (passing,) = planned(anatomy, tokenizer, [gptq]).costs
    (one,), (two,) = (planned(anatomy, tokenizer, recipes).costs for recipes in (awq[:1], awq))
    assert one.tokens == pytest.approx(passing.tokens + searched)
    monkeypatch.setattr(_Needs, "seconds_to_load_and_choose", lambda self: (0.0, 0.0))
    monkeypatch.setattr(_Needs, "seconds_a_token", lambda self: 1.0)
    assert planned(anatomy, tokenizer, awq).costs[0].seconds == pytest.approx(3 * two.tokens)
    assert two.tokens > one.tokens + searched


def test_the_costs_of_waves_add_up_to_the_plan(anatomy, tokenizer):
    recipes = [MAGNITUDE, WANDA, SPARSEGPT]
    free = planned(anatomy, tokenizer, recipes, LONG)
    plan = planned(anatomy, tokenizer, recipes, LONG, memory=free.memory - 1)
    assert len(plan.costs) == len(plan.waves) > 1
    assert sum(cost.kept for cost in plan.costs) == plan.kept
    assert sum(cost.seconds for cost in plan.costs) == pytest.approx(3 * plan.seconds_a_block)
    for name in ("memory", "device_memory", "scratch"):
        assert max(getattr(cost, name) for cost in plan.costs) == getattr(plan, name)
    untried = planned(anatomy, tokenizer, recipes, LONG, trial=False)
    assert untried.seconds_a_block == 0
    assert [cost.tokens for cost in untried.costs] == [cost.tokens for cost in free.costs]


@pytest.mark.parametrize(
    "survey", [{"allocation": "owl"}, {"method": "block-influence"}, {"method": "wanda", "pattern": "blocks"}]
)
def test_a_survey_passes_text_through_the_dense_model_and_that_is_counted(anatomy, tokenizer, monkeypatch, survey):
    monkeypatch.setattr(_Needs, "seconds_to_load_and_choose", lambda self: (0.0, 0.0))
    monkeypatch.setattr(_Needs, "seconds_a_token", lambda self: 1.0)
    none, plan = (
        planned(anatomy, tokenizer, [Recipe(**{"method": "magnitude", "sparsity": 0.5} | more)])
        for more in ({}, survey)
    )
    tokens = SHORT.samples * SHORT.length
    assert none.seconds_a_block == 0
    assert plan.seconds_a_block == pytest.approx(tokens)
    states = 2 * tokens * anatomy.hidden_size * 4  # before and after a block
    assert plan.memory - none.memory == pytest.approx(1.4 * states, abs=2)


def test_gradients_beside_inputs_are_kept_for_one_set_at_a_time(anatomy, tokenizer):
    gblm = Recipe(method="gblm", sparsity=0.5)
    plan = planned(anatomy, tokenizer, [WANDA, gblm, SNIP], LONG[:2])
    methods = [[job.recipe.method for job in wave] for wave in plan.waves]
    assert methods == [["gblm", "snip"], ["gblm", "snip"], ["wanda", "wanda"]]
    weights = sum(a * b for a, b in covered_shapes(anatomy, gblm).values())
    alone, both = (planned(anatomy, tokenizer, [gblm], sets, in_folder=False).memory for sets in (LONG[:1], LONG[:2]))
    assert both - alone > 1.4 * 4 * weights


def test_a_cap_cuts_jobs_that_need_no_text_or_derivatives_too(anatomy, tokenizer):
    recipes = [Recipe(method=m, sparsity=s / 10, pattern="model") for s in range(3, 7) for m in ("magnitude", "snip")]
    free = planned(anatomy, tokenizer, recipes)
    assert [len(wave) for wave in free.waves] == [4, 4]
    capped = planned(anatomy, tokenizer, recipes, memory=free.memory - 1)
    assert [len(wave) for wave in capped.waves] == [2, 2, 2, 2]
    assert capped.memory < free.memory


def test_the_size_of_quantized_variants_is_foreseen(anatomy, tokenizer, tmp_path):
    recipes = [Recipe(method="gptq", bits=bits, group=group) for bits, group in ((4, 8), (3, 16), (2, 0))]
    jobs = planned_jobs(recipes, [SHORT])
    variants = prune(anatomy.model, tokenizer, recipes, CORPUS, SHORT, folder=tmp_path)
    for job, variant in zip(jobs, variants, strict=True):
        foreseen = _Needs(anatomy, None, 64).kept(job)
        stored = sum(tensor.nbytes for key in variant.codes for tensor in variant.codes[key].tensors().values())
        assert foreseen == pytest.approx(stored, rel=0.35 if job.recipe.group == 0 else 0.12)  # zero points are padded


def test_a_cap_that_is_too_small_names_both_numbers(anatomy, tokenizer, tmp_path):
    with pytest.raises(MemoryCapError) as caught:
        planned(anatomy, tokenizer, [WANDA], memory=200 << 20)
    assert str(caught.value) == (
        "a memory cap of 0.20 GiB cannot hold one block during pruning: this model and these recipes need about "
        "0.69 GiB; prunescope prune can read the checkpoint one block at a time"
    )
    streamed, _ = load_model(str(checkpoint(tmp_path)), stream=True)
    with pytest.raises(MemoryCapError, match=r"0.20 GiB cannot .* this model and these recipes need about 0.69 GiB$"):
        planned(Anatomy(streamed), tokenizer, [WANDA], memory=200 << 20)


def test_a_cap_that_is_too_small_for_derivatives_says_what_they_need(anatomy, tokenizer):
    with pytest.raises(MemoryCapError, match=r"GiB; snip needs the whole model in memory$"):
        planned(anatomy, tokenizer, [WANDA, SNIP], memory=200 << 20)


def test_fine_tuning_takes_memory_time_and_disk(anatomy, tokenizer, monkeypatch):
    monkeypatch.setattr(_Needs, "seconds_a_token", lambda self: 1.0)
    monkeypatch.setattr(_Needs, "seconds_to_load_and_choose", lambda self: (0.0, 0.0))
    steps = {"steps": 10, "batch": 2}
    lora = Recipe(method="wanda", sparsity=0.5, recover="lora", parameters={**steps, "rank": 1})
    tuned = Recipe(method="wanda", sparsity=0.5, recover="fine-tune", parameters=steps)
    plain, narrow, full = (planned(anatomy, tokenizer, [recipe], batch_tokens=16) for recipe in (WANDA, lora, tuned))
    assert plain.memory < narrow.memory < full.memory
    weights = sum(outputs * inputs for outputs, inputs in covered_shapes(anatomy, WANDA).values())
    assert narrow.kept - plain.kept == pytest.approx(weights / 2 * 4, rel=0.01)
    head = 1 + anatomy.vocabulary * anatomy.hidden_size / weights
    tokens = 10 * 2 * 16 * 3 + 2 * 3 * 16
    assert narrow.seconds_a_block - plain.seconds_a_block == pytest.approx(tokens * head)
    with pytest.raises(
        MemoryCapError, match=r'GiB; recover = "lora" needs the whole model and a copy of its weights in memory$'
    ):
        planned(anatomy, tokenizer, [WANDA, lora], memory=200 << 20)


def test_what_needs_no_text_or_derivatives_goes_in_waves_of_its_own(anatomy, tokenizer):
    plan = planned(anatomy, tokenizer, [WANDA, MAGNITUDE, SNIP], LONG[:2])
    assert [[job.recipe.method for job in wave] for wave in plan.waves] == [
        ["magnitude"],
        ["snip"],
        ["snip"],
        ["wanda", "wanda"],
    ]


def test_choosing_weights_takes_time_without_text_too(anatomy, monkeypatch):
    monkeypatch.setattr(_Needs, "seconds_to_load_and_choose", lambda self: (0.5, 1e-3))
    plan = make_plan(anatomy, [Job(MAGNITUDE)], None)
    weights = sum(outputs * inputs for outputs, inputs in covered_shapes(anatomy, MAGNITUDE).values())
    assert plan.seconds_a_block == pytest.approx(0.5 + 1e-3 * weights / len(anatomy.blocks))
    assert len(plan.waves) == 1
    assert make_plan(anatomy, [Job(MAGNITUDE)], None, in_folder=False).seconds_a_block == 0


def test_loading_and_choosing_are_timed(anatomy):
    loading, a_weight = _Needs(anatomy, None, 64, in_folder=True).seconds_to_load_and_choose()
    assert loading >= 0
    assert a_weight > 0


def test_a_wave_that_was_begun_stays_as_it_was_if_it_fits(anatomy, tokenizer):
    jobs = planned_jobs([WANDA, SPARSEGPT], LONG)
    text = CalibrationText.draw(tokenizer, CORPUS, LONG)
    finished, begun, left = jobs[0], tuple(jobs[:3]), tuple(jobs[3:])
    pending = [job for job in jobs if job != finished]
    assert make_plan(anatomy, pending, text, begun=[begun]).waves == (begun, left)
    least = make_plan(anatomy, pending, text, memory=1 << 33, begun=[begun]).memory
    assert make_plan(anatomy, pending, text, memory=least, begun=[begun]).waves == (begun, left)
    alone = make_plan(anatomy, [jobs[2]], text, memory=make_plan(anatomy, [jobs[2]], text).memory - 1).memory
    plan = make_plan(anatomy, [jobs[2]], text, memory=alone, begun=[begun])  # with SparseGPT, it would not fit
    assert plan.waves == ((jobs[2],),)


@pytest.fixture
def on_a_gpu(anatomy, monkeypatch):
    """The anatomy of a model that says it is on a GPU; nothing is run."""
    monkeypatch.setattr(Anatomy, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(_Needs, "seconds_a_token", lambda self: 1e-3)
    monkeypatch.setattr(_Needs, "seconds_to_load_and_choose", lambda self: (1e-3, 1e-9))
    return anatomy


def test_a_device_has_a_budget_of_its_own(on_a_gpu, tokenizer, make_model):
    recipes = [WANDA, SPARSEGPT, MAGNITUDE.model_copy(update={"pattern": "model"})]
    jobs, text = planned_jobs(recipes, LONG), CalibrationText.draw(tokenizer, CORPUS, LONG)
    free = make_plan(on_a_gpu, jobs, text)
    assert free.states == "device"
    assert free.device_memory > 0
    assert "device memory about" in str(free)
    off = make_plan(on_a_gpu, jobs, text, device_memory=free.device_memory - 1)
    assert off.states == "host"
    assert off.device_memory < free.device_memory
    assert off.memory > free.memory  # there they are instead
    assert "hidden states in host memory" in str(off)
    spilled = make_plan(on_a_gpu, jobs, text, device_memory=free.device_memory - 1, memory=off.memory - 1)
    assert spilled.states == "disk"
    assert spilled.memory < off.memory
    waves = len(spilled.waves)
    cut = make_plan(on_a_gpu, jobs, text, device_memory=spilled.device_memory - 1)
    assert len(cut.waves) > waves
    assert cut.device_memory < spilled.device_memory
    with pytest.raises(MemoryCapError, match=r"a cuda memory cap of 0.10 GiB cannot hold"):
        make_plan(on_a_gpu, jobs, text, device_memory=100 << 20)
    with pytest.raises(MemoryCapError, match=r"a memory cap of 0.10 GiB cannot hold"):
        make_plan(on_a_gpu, jobs, text, memory=100 << 20, device_memory=1 << 40)


def test_what_stays_on_the_device_is_counted(on_a_gpu, tokenizer):
    """Gram matrices, and the scores of a whole model."""
    plain, gram = (planned_on(on_a_gpu, tokenizer, [recipe]) for recipe in (WANDA, SPARSEGPT))
    assert gram.device_memory - plain.device_memory >= 4 * 48 * 48
    one = planned_on(on_a_gpu, tokenizer, [MAGNITUDE.model_copy(update={"pattern": "model"})])
    weights = sum(outputs * inputs for outputs, inputs in (on_a_gpu.shape(*key) for key in on_a_gpu))
    assert one.device_memory - planned_on(on_a_gpu, tokenizer, [MAGNITUDE]).device_memory >= 4 * weights


def planned_on(anatomy, tokenizer, recipes) -> Plan:
    return make_plan(anatomy, planned_jobs(recipes, [SHORT]), CalibrationText.draw(tokenizer, CORPUS, [SHORT]))


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_device_without_memory_of_its_own_cannot_be_capped(anatomy, tokenizer, in_folder):
    with pytest.raises(MemoryCapError, match=r"on the cpu, which has no memory of its own to cap"):
        planned(anatomy, tokenizer, [WANDA], device_memory=1 << 40, in_folder=in_folder)


def test_without_a_folder_all_variants_are_held_and_counted(anatomy, tokenizer):
    recipes = [WANDA, SPARSEGPT, MAGNITUDE, SNIP]
    stored = planned(anatomy, tokenizer, recipes, LONG)
    held = planned(anatomy, tokenizer, recipes, LONG, in_folder=False)
    assert len(held.waves) == 1
    assert set(held.waves[0]) == {job for wave in stored.waves for job in wave}
    assert held.memory > stored.memory
    assert held.kept == held.scratch == 0
    with pytest.raises(MemoryCapError, match="cannot hold"):
        planned(anatomy, tokenizer, recipes, LONG, in_folder=False, memory=held.memory - 1)


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (
            Plan(((Job(MAGNITUDE),),), "device", 900 << 20, 0, 3 << 20, 0.0, 8),
            "pruning plan: 1 variant, memory about 900.0 MiB, disk 3.0 MiB",
        ),
        (
            Plan(((Job(WANDA, SHORT),), (Job(SPARSEGPT, SHORT),)), "disk", 6 << 30, 5 << 30, 3 << 20, 12.34, 30),
            "pruning plan: 2 variants in 2 waves, memory about 6.0 GiB, hidden states on disk, disk 3.0 MiB plus "
            "5.0 GiB temporary, about 12.3 s per block, 6 minutes in total",
        ),
    ],
)
def test_the_plan_reads_as_one_line(plan, line):
    assert str(plan) == line


MEASURE = """
import json, resource, sys
from pathlib import Path
from rich.console import Console
import analysis.study.model
import pruning.runner
from analysis.study.run import run_study
from analysis.study.study_file import parse_study

study, out, stream = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "stream"
make_plan, plans = pruning.runner.make_plan, []

def noted(anatomy, *arguments, **named):
    assert anatomy.streamed == stream
    plans.append(make_plan(anatomy, *arguments, **named))
    return plans[-1]

pruning.runner.make_plan = noted
if stream:
    analysis.study.model._ROOM = 1 << 20  # whatever the cap
run_study(parse_study(study, "study"), out, Console(quiet=True), memory=1 << 40, only_prune=True)
status = Path("/proc/self/status")
if status.exists():  # ru_maxrss of a new process begins at that of the one that started it
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(plans[0].memory, peak)
"""


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """A Llama of 120 MiB: large enough to weigh something beside Python itself."""
    from conftest import tiny_model

    model = tiny_model(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return saved(model, tmp_path_factory.mktemp("middling"), shard="30MB")


@pytest.mark.skipif(sys.platform == "win32", reason="no resource usage there")
@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("whole", {}),
        ("stream", {}),
        ("whole", {"recover": "fine-tune", "parameters": {"steps": 1, "batch": 1}}),
    ],
    ids=["whole", "stream", "fine-tune"],
)
def test_the_estimate_is_no_less_than_the_truth_and_no_more_than_twice(middling, tmp_path, where, more):
    study = {
        "model": str(middling),
        "languages": ["en", "sw"],
        "calibration": {"sets": ["en", "en+sw"], "samples": 8, "length": 128},
        "recipes": [{"method": ["wanda"] if more else ["wanda", "sparsegpt"], "sparsity": 0.5, **more}],
    }
    command = [sys.executable, "-c", MEASURE, json.dumps(study), str(tmp_path), where]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=alone)
    assert result.returncode == 0, result.stderr
    estimate, truth = map(int, result.stdout.split())
    assert truth <= estimate <= 2 * truth
