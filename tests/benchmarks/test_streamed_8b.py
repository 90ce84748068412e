"""A model larger than the memory that it may take: peak memory and time of ``prunescope prune`` and ``run`` --memory.

    make benchmarks, or pytest tests/benchmarks/test_streamed_8b.py -s -k small
    PRUNESCOPE_BENCH_8B=/big/disk pytest tests/benchmarks/test_streamed_8b.py -s -k llama

The checkpoint has the shape of Llama-3-8B and random weights, is written once and stays in the folder (16 GB).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from benchmarks.harness import headline
from conftest import tiny_tokenizer
from pydantic import ByteSize, TypeAdapter
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

#: Blocks whose weights share a shard.
SHARD = 4
SHAPES = {
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32064,
    },
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
STUDY = """
model = "{model}"
languages = ["en", "sw"]
dtype = "{dtype}"
device = "cpu"

[calibration]
sets = ["en"]
samples = 4
length = 256

[[recipes]]
method = "wanda"
sparsity = 0.5
"""
WHOLE_STUDY = """
model = "{model}"
languages = ["en", "sw", "zh"]
dtype = "{dtype}"
device = "cpu"

[calibration]
sets = ["en", "sw", "zh"]
samples = 4
length = 128

[[recipes]]
method = "wanda"
sparsity = 0.5

[[recipes]]
method = "magnitude"
sparsity = 0.5

[evaluation]
segments = 2
fit_segments = 2
max_length = 256

[tasks]
items = "none"
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_pruning_from_shards(shape, dtype, tmp_path, tmp_path_factory, capsys):
    big = os.environ.get("PRUNESCOPE_BENCH_8B")
    if shape == "llama" and not big:
        pytest.skip("needs PRUNESCOPE_BENCH_8B, a folder with 20 GB free")
    place = Path(big or "") if shape == "llama" else tmp_path_factory.getbasetemp()
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500000.0, dtype="bfloat16")
    memory = os.environ.get("PRUNESCOPE_BENCH_MEMORY") or {"small": "1500MiB", "llama": "6GiB"}[shape]
    with capsys.disabled():
        checkpoint = written(place / f"checkpoint-{shape}", config)
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        headline(f"Wanda on a checkpoint of {size / 1e9:.1f} GB, 4 x 256 tokens, {dtype}, --memory {memory}")
        study = tmp_path / "study.toml"
        study.write_text(STUDY.format(model=checkpoint, dtype=dtype), encoding="utf-8")
        # Large results beside the checkpoint, since a folder for temporary files may be in memory.
        out = place / f"run-{shape}-{dtype}-{os.getpid()}"
        arguments = [str(command()), "prune", str(study), "--out", str(out), "--memory", memory]
        run = watched(arguments, tmp_path / "said.txt")
        if run.status == 2 and "memory cap" in run.said:
            print(f"  refused: {run.said.strip().splitlines()[-1]}")
            return
        assert run.status == 0, run.said
        plan = next(line for line in run.said.splitlines() if line.startswith("pruning plan"))
        variants = list((out / "variants").glob("*/masks.safetensors"))
        subprocess.run(["rm", "-r", str(out)], check=True)
        print(f"  {plan}")
        print(f"  peak resident memory {run.peak / 2**30:.2f} GiB, of which private {run.private / 2**30:.2f} GiB")
        amount, unit = re.search(r"memory about ([\d.]+) (\w+)", plan).groups()  # type: ignore[union-attr]
        planned = int(TypeAdapter(ByteSize).validate_python(f"{amount}{unit}"))
        cap = int(TypeAdapter(ByteSize).validate_python(memory))
        print(f"  peak / what the plan expected: {run.peak / planned:.2f}; peak / cap: {run.peak / cap:.2f}")
        print(f"  {run.seconds:.0f} s, of which {run.processor:.0f} s of processor time")
    assert len(variants) == 1
    assert run.peak < cap


@pytest.mark.parametrize("shape", list(SHAPES))
def test_whole_study_from_shards(shape, tmp_path, tmp_path_factory, capsys):
    """Four variants, three languages, all readers, frames, figures and report."""
    big = os.environ.get("PRUNESCOPE_BENCH_8B")
    if shape == "llama" and not big:
        pytest.skip("needs PRUNESCOPE_BENCH_8B, a folder with 25 GB free")
    dtype = os.environ.get("PRUNESCOPE_BENCH_DTYPE") or "bfloat16"
    place = Path(big or "") if shape == "llama" else tmp_path_factory.getbasetemp()
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500000.0, dtype="bfloat16")
    memory = os.environ.get("PRUNESCOPE_BENCH_MEMORY") or {"small": "3GiB", "llama": "8GiB"}[shape]
    with capsys.disabled():
        checkpoint = written(place / f"checkpoint-{shape}", config)
        study = tmp_path / "study.toml"
        study.write_text(WHOLE_STUDY.format(model=checkpoint, dtype=dtype), encoding="utf-8")
        out = place / f"study-{shape}-{os.getpid()}"
        arguments = [str(command()), "run", str(study), "--out", str(out), "--memory", memory]
        run = watched(arguments, tmp_path / "said.txt")
        headline(f"A study of a model of {shape}'s shape, {dtype}, --memory {memory}")
        print("  " + run.said.strip().replace("\n", "\n  "))
        print(f"  peak resident memory {run.peak / 2**30:.2f} GiB, of which private {run.private / 2**30:.2f} GiB")
        print(f"  {run.seconds:.0f} s, of which {run.processor:.0f} s of processor time")
        assert run.status == 0
        stages: Counter[str] = Counter()
        for name, result in json.loads((out / "provenance.json").read_text(encoding="utf-8"))["results"].items():
            stages[name.partition("/")[0]] += result["seconds"]
        print("  " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in stages.items()))
    assert (out / "report.html").is_file()
    assert run.peak < int(TypeAdapter(ByteSize).validate_python(memory))
    subprocess.run(["rm", "-r", str(out)], check=True)


@dataclass(frozen=True)
class Run:
    """What a process came to: exit status, output, and most memory in bytes, with and without mapped files."""

    status: int
    said: str
    peak: int
    private: int
    seconds: float
    processor: float


def watched(arguments: list[str], said: Path) -> Run:
    """Run a program to its end, what it says going into a file."""
    began = time.perf_counter()
    with said.open("wb") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT)
    private = 0
    while True:
        # The figures of a process that has ended are there until it is waited for; its memory is not.
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        private = max(private, int(found[1]) * 1024 if found else 0)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Run(
        process.returncode,
        said.read_text(encoding="utf-8"),
        usage.ru_maxrss * 1024,
        private,
        time.perf_counter() - began,
        usage.ru_utime + usage.ru_stime,
    )


def command() -> Path:
    """Return the path of the command line program that belongs to this interpreter."""
    return Path(sys.executable).parent / "prunescope"


def written(folder: Path, config: LlamaConfig) -> Path:
    """Return a folder with a checkpoint of random weights, shard by shard as large models come; made if it is not there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    groups = [["embed", *range(SHARD)]]
    groups += [list(range(a, a + SHARD)) for a in range(SHARD, config.num_hidden_layers, SHARD)]
    groups[-1].append("head")
    places: dict[str, str] = {}
    random = torch.Generator().manual_seed(0)
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {key: value for part in group for key, value in weights(part, config, random).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        del tensors
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")  # last: now it is whole
    return folder


def weights(part: int | str, config: LlamaConfig, random: torch.Generator) -> dict[str, Tensor]:
    """Return random bfloat16 weights of a block, or of what is before or behind all blocks."""
    hidden, neurons = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)

    def norm() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    if part == "embed":
        return {"model.embed_tokens.weight": matrix(config.vocab_size, hidden)}
    if part == "head":
        return {"model.norm.weight": norm(), "lm_head.weight": matrix(config.vocab_size, hidden)}
    block = {
        "self_attn.q_proj": matrix(hidden, hidden),
        "self_attn.k_proj": matrix(keys, hidden),
        "self_attn.v_proj": matrix(keys, hidden),
        "self_attn.o_proj": matrix(hidden, hidden),
        "mlp.gate_proj": matrix(neurons, hidden),
        "mlp.up_proj": matrix(neurons, hidden),
        "mlp.down_proj": matrix(hidden, neurons),
        "input_layernorm": norm(),
        "post_attention_layernorm": norm(),
    }
    return {f"model.layers.{part}.{name}.weight": value for name, value in block.items()}
