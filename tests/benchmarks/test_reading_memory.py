"""Peak memory of reading: it must not grow with the variants beyond their hidden states, nor with the text beyond the plan.

    pytest tests/benchmarks/test_reading_memory.py -s

A random model (4 blocks of 512 × 1024, float32) and its variants lie on disk; each cell of the table is a process of
its own, which writes what it reads to files, as a study does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_model, tiny_tokenizer

from pruning import Recipe, load_model, prune

CAP = 3 << 29
READ = """
import json, resource, sys
from pathlib import Path
from probes import DENSE, HeldoutStream, Session, plan_reading, read_streams
from pruning import Segment, Variant, load_model

folder, number, tokens, cap = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
model, tokenizer = load_model(str(folder / "dense"))
places = sorted((folder / "variants").iterdir())[:number]
variants = {v.id: v for v in map(Variant.open, places)}
session = Session(model, tokenizer, batch_tokens=1024)
text = [Segment(str(i), "x" * 255) for i in range(tokens // 256)]
files = {name: folder / "read" / f"{name}.safetensors" for name in (DENSE, *variants)}
stream = HeldoutStream(session, text, list(variants), files)
plan = plan_reading(session, [stream], memory=cap or None, trial=False)
read_streams(session, [stream], variants, plan)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "peak": int(status["VmHWM"].split()[0]) << 10,
    "planned": plan.memory,
    "waves": plan.waves,
    "states": (number + 1) * tokens * session.anatomy.hidden_size * 4,
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_of_reading(tmp_path, capsys):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    tiny_model("llama", **sizes, max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    model, tokenizer = load_model(str(tmp_path / "dense"))
    for number in range(32):
        recipe = Recipe(method="random", sparsity=0.5, parameters={"seed": number})
        (variant,) = prune(model, tokenizer, recipe)
        variant.save(tmp_path / "variants" / f"{number:02}")
    rows = []
    for cap in (0, CAP):
        for variants in (2, 8, 32):
            for tokens in (4096, 16384):
                command = [sys.executable, "-c", READ, str(tmp_path), str(variants), str(tokens), str(cap)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd())
                rows.append((cap, variants, tokens, json.loads(done.stdout.splitlines()[-1])))
    with capsys.disabled():
        print("\ncap       variants  tokens   peak      planned   waves  hidden states of all models")
        for cap, variants, tokens, found in rows:
            mib = {name: f"{value / 2**20:.0f} MiB" for name, value in found.items() if name != "waves"}
            print(
                f"{'none' if not cap else '2 GiB':8}  {variants:8}  {tokens:6}   {mib['peak']:8}  {mib['planned']:8}  "
                f"{found['waves']:5}  {mib['states']}"
            )
    for cap, *_, found in rows:
        assert found["peak"] <= 1.1 * found["planned"]
        assert not cap or found["peak"] <= cap
