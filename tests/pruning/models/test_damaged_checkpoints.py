"""Whatever is wrong in the files of a checkpoint: it loads, or one clear line says why not."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from checkpoints import checkpoint, shards

from pruning import load_model
from pruning.errors import ModelError, PrunescopeError
from pruning.models.checkpoint import INDEX

WRONG = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    10**12,
    10**30,
    -0.5,
    1e308,
    float("nan"),
    "",
    "x",
    "a\nb",
    "\0",
    "x" * 5000,
    "../x.safetensors",
    [],
    [1],
    [None, "x"],
    [[]],
    {},
    {"a": 1},
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("whole") / "model")


def places(content):
    """Return every (container, key) of JSON content, at all depths."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys):
        yield content, key
        yield from places(content[key])


def spoil(content, draw):
    """Change one value of JSON content, or take it out."""
    container, key = draw.choice(list(places(content)))
    if draw.random() < 0.1:
        del container[key]
    else:
        container[key] = draw.choice(WRONG)
    return content


def rewrite(path, draw):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(spoil(content, draw) if draw.random() < 0.9 else draw.choice(WRONG)))


def rewrite_header(path, draw):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(spoil(json.loads(raw[8 : 8 + size]), draw)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])


def rewrite_file(folder, name, draw):
    if name == "shard":
        rewrite_header(draw.choice(shards(folder)), draw)
    else:
        rewrite(folder / name, draw)


def assert_loads_or_says_why_not(folder, stream):
    try:
        load_model(str(folder), stream=stream, device="cpu")
    except PrunescopeError as error:
        said = str(error)
    else:
        return None
    assert "\n" not in said
    assert len(said) < 700
    return said


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX, "shard"])
def test_a_wrong_value_anywhere_is_one_clear_line_or_does_no_harm(tmp_path, whole, name, part):
    refused = 0
    for seed in range(10 * part, 10 * part + 10):
        folder = shutil.copytree(whole, tmp_path / str(seed))
        rewrite_file(folder, name, random.Random(f"{name} {seed}"))
        refused += assert_loads_or_says_why_not(folder, stream=seed % 2 == 0) is not None
    assert refused or name == "tokenizer_config.json"


def set_config(folder, **values):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | values))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, but the checkpoint has 30 tensors"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers = 1000000000"),
        ({"vocab_size": 10**11}, "parameters, but the checkpoint has"),
        ({"intermediate_size": 10**12}, "parameters, but the checkpoint has"),
        ({"vocab_size": -5}, "config.json cannot be used"),
        ({"hidden_size": 0}, "config.json"),
        ({"num_attention_heads": 0}, "config.json cannot be used (ZeroDivisionError"),
        ({"hidden_size": "wide"}, "config.json cannot be used"),
        ({"rope_parameters": 3}, "config.json cannot be used"),
    ],
)
def test_an_impossible_size_is_refused_before_anything_is_built(tmp_path, whole, stream, values, words):
    folder = shutil.copytree(whole, tmp_path / "model")
    set_config(folder, **values)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), stream=stream, device="cpu")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_tables_of_positions_that_would_fill_memory_are_refused(tmp_path, stream):
    folder = checkpoint(tmp_path, "opt")
    set_config(folder, max_position_embeddings=10**10)
    with pytest.raises(ModelError, match="parameters, but the checkpoint has"):
        load_model(str(folder), stream=stream, device="cpu")
