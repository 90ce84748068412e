"""What a grid will need is told before it starts, and is about what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from checkpoints import CORPUS, SHORT, checkpoint, saved

from pruning import Anatomy, CalibrationSet, Recipe, load_model
from pruning.engine import Job
from pruning.engine.plan import MemoryCapError, Plan, make_plan
from pruning.text.calibration import CalibrationText
from pruning.variants.variant import planned_jobs

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
    assert (len(free.waves), free.spill) == (1, False)
    waves = []
    with pytest.raises(MemoryCapError):
        while True:
            cap = plan.memory - 1
            plan = planned(anatomy, tokenizer, recipes, LONG[:2], memory=cap)
            assert plan.spill
            assert plan.memory <= cap
            assert [job for wave in plan.waves for job in wave] == list(free.waves[0])
            waves.append(len(plan.waves))
    assert waves == sorted(set(waves))  # fewer jobs at a time, the less memory there is
    assert waves[-1] == len(free.waves[0])


def test_a_cap_cuts_jobs_that_need_no_text_or_derivatives_too(anatomy, tokenizer):
    recipes = [Recipe(method=m, sparsity=s / 10, pattern="model") for s in range(3, 7) for m in ("magnitude", "snip")]
    free = planned(anatomy, tokenizer, recipes)
    assert [len(wave) for wave in free.waves] == [4, 4]
    capped = planned(anatomy, tokenizer, recipes, memory=free.memory - 1)
    assert [len(wave) for wave in capped.waves] == [2, 2, 2, 2]
    assert capped.memory < free.memory


def test_a_cap_that_is_too_small_names_both_numbers(anatomy, tokenizer, tmp_path):
    with pytest.raises(MemoryCapError) as caught:
        planned(anatomy, tokenizer, [WANDA], memory=200 << 20)
    assert str(caught.value) == (
        "a memory cap of 0.20 GiB cannot hold one block with what it needs: about 0.69 GiB for this model and these "
        "recipes; prunescope prune reads a checkpoint on disk a block at a time"
    )
    streamed, _ = load_model(str(checkpoint(tmp_path)), stream=True)
    with pytest.raises(MemoryCapError, match=r"0.20 GiB cannot .* 0.69 GiB for this model and these recipes$"):
        planned(Anatomy(streamed), tokenizer, [WANDA], memory=200 << 20)


def test_a_cap_that_is_too_small_for_derivatives_says_what_they_need(anatomy, tokenizer):
    with pytest.raises(MemoryCapError, match=r"recipes; snip needs the whole model in memory$"):
        planned(anatomy, tokenizer, [WANDA, SNIP], memory=200 << 20)


def test_what_needs_no_text_or_derivatives_goes_in_waves_of_its_own(anatomy, tokenizer):
    plan = planned(anatomy, tokenizer, [WANDA, MAGNITUDE, SNIP], LONG[:2])
    assert [[job.recipe.method for job in wave] for wave in plan.waves] == [
        ["magnitude"],
        ["snip"],
        ["snip"],
        ["wanda", "wanda"],
    ]


def test_without_text_there_is_nothing_to_time(anatomy):
    plan = make_plan(anatomy, [Job(MAGNITUDE)], None)
    assert plan.seconds_a_block == 0
    assert len(plan.waves) == 1


def test_a_wave_that_was_begun_stays_as_it_was_if_it_fits(anatomy, tokenizer):
    jobs = planned_jobs([WANDA, SPARSEGPT], LONG)
    text = CalibrationText.draw(tokenizer, CORPUS, LONG)
    finished, begun, left = jobs[0], tuple(jobs[:3]), tuple(jobs[3:])
    pending = [job for job in jobs if job != finished]
    assert make_plan(anatomy, pending, text, begun=[begun]).waves == (begun, left)
    least = make_plan(anatomy, pending, text, memory=1 << 33, begun=[begun]).memory
    assert make_plan(anatomy, pending, text, memory=least, begun=[begun]).waves == (begun, left)
    alone = make_plan(anatomy, [jobs[0]], text).memory
    plan = make_plan(anatomy, [jobs[2]], text, memory=alone, begun=[begun])  # with it, it would not fit
    assert plan.waves == ((jobs[2],),)


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (
            Plan(((Job(MAGNITUDE),),), False, 900 << 20, 0, 3 << 20, 0.0, 8),
            "pruning plan: 1 variant, memory about 900.0 MiB, disk 3.0 MiB",
        ),
        (
            Plan(((Job(WANDA, SHORT),), (Job(SPARSEGPT, SHORT),)), True, 6 << 30, 5 << 30, 3 << 20, 12.34, 30),
            "pruning plan: 2 variants in 2 waves, memory about 6.0 GiB, hidden states on disk, disk 3.0 MiB and 5.0 GiB "
            "while it runs, about 12.3 s a block, 6 minutes in all",
        ),
    ],
)
def test_the_plan_reads_as_one_line(plan, line):
    assert str(plan) == line


MEASURE = """
import json, resource, sys
from pathlib import Path
from rich.console import Console
import analysis.study.pruning_stage
from analysis.study.run import run_study
from analysis.study.study_file import parse_study

study, out, stream = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "stream"
make_plan, plans = analysis.study.pruning_stage.make_plan, []

def noted(anatomy, *arguments, **named):
    assert anatomy.streamed == stream
    plans.append(make_plan(anatomy, *arguments, **named))
    return plans[-1]

analysis.study.pruning_stage.make_plan = noted
analysis.study.pruning_stage._ROOM = 1 << 20  # streams whatever the cap
run_study(parse_study(study, "study"), out, Console(quiet=True), memory=(1 << 40) if stream else None, only_prune=True)
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
@pytest.mark.parametrize("where", ["whole", "stream"])
def test_the_estimate_is_no_less_than_the_truth_and_no_more_than_twice(middling, tmp_path, where):
    study = {
        "model": str(middling),
        "languages": ["en", "sw"],
        "calibration": {"sets": ["en", "en+sw"], "samples": 8, "length": 128},
        "recipes": [{"method": ["wanda", "sparsegpt"], "sparsity": 0.5}],
    }
    command = [sys.executable, "-c", MEASURE, json.dumps(study), str(tmp_path), where]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=alone)
    assert result.returncode == 0, result.stderr
    estimate, truth = map(int, result.stdout.split())
    assert truth <= estimate <= 2 * truth
