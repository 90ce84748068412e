"""What docs/extending.md shows works as it stands there: its package is written to a folder, and used."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import saved
from command_line import prunescope
from conftest import tiny_model

from analysis import Study, look
from analysis.frames import read_frame
from analysis.frames.added import added_frames
from analysis.study import figures
from analysis.study.analyses import NAMES, Measured, all_analyses
from probes import ItemSource
from pruning import Anatomy, CalibrationSet, Corpus, Recipe, known_methods, prune, supported_architectures, text_source
from pruning.code_version import code_version
from pruning.engine import planned_jobs
from pruning.errors import StudyError, TextError
from pruning.extensions import ExtensionWarning, extensions
from pruning.models.layouts import layout_of
from pruning.runner import job_key

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"^```python\n# (yours/\w+\.py)\n(.*?)^```", PAGE, re.M | re.S))
(DECLARED,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.M | re.S)
STUDY = """
model = "model"
languages = ["en", "sw"]
[text]
calibration = "counting:80"
parallel = "counting:80"
heldout = "counting:80"
[calibration]
sets = ["sw"]
samples = 4
length = 32
[[recipes]]
method = "smallest-rows"
sparsity = 0.5
[evaluation]
segments = 6
fit_segments = 6
max_length = 40
[tasks]
items = "sums:4"
"""


def forget() -> None:
    """Have entry points looked for again."""
    extensions.cache_clear()
    code_version.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "yours"]:
        del sys.modules[name]


def installed(site: Path, declared: str, modules: dict[str, str]) -> None:
    """Write a package and the metadata that an installation leaves."""
    for path, code in modules.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(code, encoding="utf-8")
    (site / "yours" / "__init__.py").touch()
    metadata = site / "yours-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: yours\nVersion: 1.2\n")
    groups = tomllib.loads(declared)["project"]["entry-points"]
    lines = [
        line for group, points in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package of the page, on Python's path."""
    site = tmp_path_factory.mktemp("site")
    installed(site, DECLARED, MODULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        forget()
        yield site
    forget()


@pytest.fixture(scope="module")
def finished(package, tmp_path_factory):
    """A study that uses all of it."""
    folder = tmp_path_factory.mktemp("study")
    saved(tiny_model(max_position_embeddings=1024), folder / "model", shard="1GB")
    (folder / "study.toml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "study_figures", lambda *_: iter(()))  # they take most of the time
        result = prunescope("run", folder / "study.toml", "--out", folder / "out")
    assert result.returncode == 0, result.stderr
    return folder / "out"


def test_the_page_declares_what_it_shows():
    groups = tomllib.loads(DECLARED)["project"]["entry-points"]
    assert len(groups) == len(MODULES) == 5
    for points in groups.values():
        ((_, value),) = points.items()
        module, _, name = value.partition(":")
        assert re.search(rf"^(def {name}\(|{name} = )", MODULES[module.replace(".", "/") + ".py"], re.M)


def test_a_method_of_another_package_prunes(package, tokenizer):
    assert "smallest-rows" in known_methods()
    model = tiny_model()
    recipe = Recipe(method="smallest-rows", sparsity=0.5, parameters={"power": 2})
    (variant,) = prune(
        model, tokenizer, [recipe], Corpus.of("bundled"), CalibrationSet.named("en", samples=2, length=16)
    )
    assert variant.id == "smallest-rows-0.5-matrix-power=2"
    weight = model.model.layers[1].mlp.up_proj.weight.detach().double().numpy()
    scores = np.abs(weight) * (weight**2).sum(axis=1, keepdims=True)
    kept = scores > np.sort(scores, axis=None)[scores.size // 2 - 1]
    np.testing.assert_array_equal(variant.masks[1, "up"].numpy(), kept)
    with pytest.raises(ValueError, match=r'unknown method "smallest-row".*did you mean "smallest-rows"'):
        Recipe(method="smallest-row", sparsity=0.5)


def test_variants_are_made_again_when_the_code_of_their_method_changes(package):
    def keys() -> list[str]:
        recipes = [Recipe(method=name, sparsity=0.5) for name in ("smallest-rows", "magnitude")]
        return [job_key(job, "model", "float32", None) for job in planned_jobs(recipes, [])]

    before = keys()
    path = package / "yours" / "methods.py"
    code = path.read_text()
    try:
        path.write_text(code.replace("abs()", "square()"))
        forget()
        after = keys()
    finally:
        path.write_text(code)
        forget()
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_study_uses_method_text_items_and_metric(finished, tokenizer):
    study = Study.open(finished)
    (variant,) = study.variants()
    assert study.models["method"].tolist() == ["dense", "smallest-rows"]
    frame = read_frame(finished / "frames" / "worse_segments.parquet")
    assert {path.stem for path in (finished / "frames").iterdir()} == {*NAMES, "worse_segments"}
    assert frame.equals(study.worse_segments)
    assert frame[frame["method"] == "dense"]["value"].tolist() == [0, 0]
    assert set(study.frame("items", metric="correct")["task"]) == {"sums"}
    assert set(study.frame("items", metric="correct")["item"]) == {f"{n}{side}" for n in range(1, 5) for side in "ab"}
    assert "share of held-out segments with a lower likelihood" in (finished / "report.html").read_text()
    # the metric, from transformers alone
    dense, pruned = tiny_model(max_position_embeddings=1024), tiny_model(max_position_embeddings=1024)
    for (layer, role), mask in variant.masks.items():
        part = "self_attn" if role in "qkvo" else "mlp"
        pruned.get_parameter(f"model.layers.{layer}.{part}.{role}_proj.weight").data *= mask
    for language in ("en", "sw"):
        worse = []
        for segment in Corpus.of("counting:80").take("heldout", language, 6):
            ids = torch.tensor([tokenizer(segment.text)["input_ids"][:40]])
            with torch.no_grad():
                losses = [model(ids, labels=ids).loss for model in (dense, pruned)]
            worse.append(float(losses[1] > losses[0]))
        value = frame[(frame["method"] != "dense") & (frame["language"] == language)]["value"].item()
        assert value == pytest.approx(np.mean(worse))


def test_a_look_has_the_frame_too(package, finished, tokenizer):
    (variant,) = Study.open(finished).variants()
    seen = look(
        tiny_model(max_position_embeddings=1024),
        tokenizer,
        [variant],
        ["en", "sw"],
        text="counting:80",
        segments=6,
        fit_segments=6,
        items="none",
    )
    assert "worse_segments" in dir(seen)
    assert set(seen.worse_segments["metric"]) == {"worse"}


def test_text_and_items_of_another_package_are_read_by_what_follows_the_colon(package):
    segments = list(text_source("counting:3").segments("sw"))
    assert [segment.id for segment in segments] == ["0", "1", "2"]
    assert segments[1].text.startswith("mbili tatu")
    items = ItemSource("sums:2").items("en")
    assert [(item.prompt, item.choices[item.answer]) for item in items] == [
        ("1 + 1 =", " 2"),
        ("1 + 2 =", " 3"),
        ("2 + 2 =", " 4"),
        ("2 + 3 =", " 5"),
    ]
    with pytest.raises(TextError, match=r'no text for German .*"counting:3" of yours 1.2 failed'):
        list(text_source("counting:3").segments("de"))
    with pytest.raises(TextError, match=r'no items for English .*"sums:many" of yours 1.2 failed'):
        ItemSource("sums:many").items("en")
    with pytest.raises(TextError, match=r'unknown text source "counted:3".*"counting:…"'):
        text_source("counted:3")
    with pytest.raises(TextError, match=r'unknown item source "sum:3".*"sums:…"'):
        ItemSource("sum:3")


def test_an_architecture_of_another_package_is_known(package):
    assert "glm4" in supported_architectures()
    model = tiny_model("glm4")
    assert layout_of(model).sites["up"].path == "mlp.gate_up_proj"
    weight = model.model.layers[0].mlp.gate_up_proj.weight
    torch.testing.assert_close(Anatomy(model).weight(0, "up"), weight[len(weight) // 2 :])


#: What is wrong with an entry point, and what is said of it.
BROKEN = {
    ("methods", "gone", "yours.nowhere:X"): "No module named 'yours.nowhere'",
    ("methods", "nameless", "yours.broken:NOTHING"): "has no attribute 'NOTHING'",
    ("methods", "number", "yours.broken:NUMBER"): 'should be a pruning.Method with the name "number"',
    ("methods", "wanda", "yours.broken:WANDA"): 'a method named "wanda" is already registered',
    ("metrics", "number", "yours.broken:NUMBER"): "should be an analysis.frames.AddedFrame",
    ("metrics", "perplexity", "yours.broken:FRAME"): '"perplexity" cannot be the name of another frame',
    ("metrics", "strange", "yours.broken:FRAME"): 'unknown column "colour"',
    ("text_sources", "file", "yours.broken:sane"): '"file" cannot be the name of a source of text',
    ("text_sources", "number", "yours.broken:NUMBER"): "should be a function",
    ("item_sources", "none", "yours.broken:sane"): '"none" cannot be the name of a source of items',
    ("item_sources", "raises", "yours.raises:X"): "one of those days",
    ("architectures", "llama", "yours.broken:LAYOUT"): 'the architecture "llama" is known already',
    ("architectures", "number", "yours.broken:NUMBER"): "should be a pruning.Layout",
}
BROKEN_CODE = """
from analysis.frames import AddedFrame, FrameSpec, Metric
from pruning import Layout, Method
NUMBER = 3
WANDA = Method("wanda", abs)
SANE = Method("sane", abs)
FRAME = AddedFrame(FrameSpec(("colour",), {"m": Metric("", "")}), abs)
FAILS = AddedFrame(FrameSpec(("language",), {"m": Metric("", "")}), abs)
LAYOUT = Layout({})
def sane(rest, language):
    return []
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A package with entry points of which most cannot be used."""
    points = {}
    for group, name, value in [
        *BROKEN,
        ("methods", "sane", "yours.broken:SANE"),
        ("text_sources", "sane", "yours.broken:sane"),
        ("item_sources", "sane", "yours.broken:sane"),
    ]:
        points.setdefault(f"prunescope.{group}", {})[name] = value
    declared = "[project.entry-points]\n" + "\n".join(
        f'"{group}" = {{ {", ".join(f"{k} = {v!r}" for k, v in one.items())} }}' for group, one in points.items()
    )
    installed(
        tmp_path, declared, {"yours/broken.py": BROKEN_CODE, "yours/raises.py": 'raise OSError("one of those days")'}
    )
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield tmp_path
    forget()


def test_what_cannot_be_used_is_one_line_each_and_the_rest_can(broken):
    ask = {
        "methods": known_methods,
        "metrics": added_frames,
        "text_sources": lambda: text_source("sane:"),
        "item_sources": lambda: ItemSource("sane:"),
        "architectures": supported_architectures,
    }
    for group, listed in ask.items():
        with pytest.warns(ExtensionWarning) as warned:
            listed()
        said = [str(one.message) for one in warned]
        expected = {name: (value, words) for (kind, name, value), words in BROKEN.items() if kind == group}
        assert len(said) == len(expected)
        for name, (value, words) in expected.items():
            (line,) = [line for line in said if f'yours 1.2 adds "{name}" (prunescope.{group} = {value})' in line]
            assert words in line
            assert "\n" not in line
        listed()  # not said a second time
    assert {"sane", "wanda"} <= set(known_methods())
    with pytest.raises(TextError, match=r"should return some pruning.Segment"):
        list(text_source("sane:").segments("en"))


def test_the_command_line_says_it_in_one_line_and_goes_on(broken):
    done = prunescope("new", broken / "study.toml", "--model", "demo", "--methods", "wanda")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("prunescope: yours 1.2 adds ") for line in lines)


def test_a_frame_that_cannot_be_made_names_its_package(package):
    make = all_analyses()["worse_segments",]
    nothing = type("Nothing", (Measured,), dict.fromkeys(Measured.__abstractmethods__))()
    with pytest.raises(StudyError, match=r'the frame "worse_segments" of yours 1.2 cannot be made: '):
        make(nothing)
