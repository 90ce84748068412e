"""A whole study of a tiny random model on the bundled text."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from command_line import COMMAND, expect_one_line, nothing_was_made, prunescope
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pages import written
from studies import STUDY

from analysis import lape, load_study, open_readings, plots, read_frame
from analysis.frames import FRAMES, STUDY_FRAMES, VARIANT_COLUMNS, recipes_of
from analysis.study.power import study_power
from analysis.study.records import Records
from pruning import Variant
from pruning.files import PARTIAL

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
#: Looks at the page from outside and leaves what it finds in the title.
LOOK = """
const page = document.querySelector("iframe").contentDocument;
const table = [...page.querySelectorAll("table.sortable")].find(t => t.textContent.includes("× dense"));
const column = () => [...table.rows].slice(1).map(row => Number(row.cells[2].dataset.value));
const before = column();
table.rows[0].cells[2].querySelector("button").click();
const rising = column();
table.rows[0].cells[2].querySelector("button").click();
const falling = column();
const menu = page.getElementById("filters").elements.language;
menu.value = "sw";
menu.dispatchEvent(new Event("change", { bubbles: true }));
const rows = page.querySelector('details.rows[data-chart="perplexity"]');
rows.open = true;
rows.dispatchEvent(new Event("toggle"));
const cells = [...rows.querySelectorAll("tbody tr")].map(row => [...row.cells].map(cell => cell.textContent));
document.title = "found" + JSON.stringify({
  charts: page.querySelectorAll(".plot svg").length,
  places: page.querySelectorAll(".plot").length,
  cells,
  before, rising, falling,
  sorted: table.rows[0].cells[2].getAttribute("aria-sort"),
  images: page.images.length,
  whole: [...page.images].filter(image => image.complete && image.naturalWidth > 0).length,
  missing: [...page.querySelectorAll("nav a")].filter(a => !page.querySelector(a.getAttribute("href"))).length,
  wide: page.documentElement.scrollWidth - page.documentElement.clientWidth,
});
"""

#: Blocks would give between less than nothing and a few per cent.
UNREACHABLE = """
[[recipes]]
method = "wanda"
sparsity = 0.01
allocation = "owl"
"""


@pytest.fixture(scope="module")
def finished(place):
    result = prunescope("run", place / "study.toml", "--out", place / "out")
    assert result.returncode == 0, result.stderr
    report, following = result.stdout.splitlines()
    assert report == f"report: {place / 'out' / 'report.html'}"
    assert following.startswith(f"Next: prunescope diagnose {place / 'out'} --variant ")
    variant, language = re.search(r"--variant (\S+) --language (\S+)", following).groups()
    calibration = json.loads((place / "out" / "variants" / variant / "recipe.json").read_text())["calibration"]
    assert language not in calibration["languages"]
    # there is something to look at before anything is read
    first = f"a first figure: {place / 'out' / 'figures' / 'mask-overlap-wanda-0.5-row-pruned.png'}"
    assert 0 < result.stderr.index(first) < result.stderr.index("] reading ")
    return place / "out"


def finished_files(folder: Path) -> list[Path]:
    """Return the records of a study and the files of the results on record."""
    records = list((folder / "records").rglob("*.json"))
    return records + [folder / name for path in records for name in json.loads(path.read_text())["files"]]


def contents(folder: Path, *parts: str) -> dict[str, bytes]:
    files = [path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


#: Results other than figures, which take long to draw, and tables.
DATA = ("variants", "readings", "frames")
RESULTS = (*DATA, "figures", "tables")


def test_study_folder_holds_what_the_readme_lists(finished):
    names = sorted(path.name for path in finished.iterdir() if path.name != ".lock")
    assert names == [
        "figures",
        "frames",
        "provenance.json",
        "readings",
        "records",
        "report.html",
        "study.toml",
        "tables",
        "variants",
    ]
    assert sorted(path.stem for path in (finished / "frames").iterdir()) == sorted(STUDY_FRAMES)
    assert not list(finished.rglob("*" + PARTIAL))


def test_frames_have_a_row_for_everything_that_was_asked(finished):
    frames = {name: read_frame(finished / "frames" / f"{name}.parquet") for name in STUDY_FRAMES}
    variants, languages, layers = 4 + 1, 3, 3
    assert len(frames["perplexity"]) == 2 * (variants + 1) * languages
    assert len(frames["signal"]) == 2 * variants * languages * layers * 8
    assert set(frames["neuron_entropy"].groupby(list(VARIANT_COLUMNS), observed=True).size()) == {101 + 95}
    assert len(frames["mask_overlap"]) == 2 * (4 * 3 // 2) * layers * 7
    pairs = frames["mask_overlap"].groupby(["calibration", "seed", "other_calibration", "other_seed"], observed=True)
    assert (shared := pairs["shared_text"].first())["sw", 0, "sw", 1] == 0  # two draws of six sequences
    assert {0, 2 / 6} == set(shared)  # all languages have two sequences of each
    assert len(frames["sparsity"]) == variants * layers * 7
    assert len(frames["language_neurons"]) == 4 * (variants + 1) * languages * layers
    categories, items = 4, 2
    assert len(frames["items"]) == (variants + 1) * languages * categories * items * (2 + 2)
    whole = frames["accuracy"][frames["accuracy"]["part"] == "all"]
    assert len(whole) == (3 + 6 * variants) * (languages + 1) * categories
    # 5 metrics of a comparison, 6 pairs of sets with one seed or two, no other single language for one of the three
    contrasts = frames["contrasts"]
    assert len(contrasts[contrasts["other_calibration"] != "others"]) == 5 * 3 * languages
    assert contrasts["p_adjusted"].between(0, 1).all()
    assert (contrasts["p_adjusted"] >= contrasts["p_value"] - 1e-12).all()
    knowledge = frames["subspaces"]["metric"] == "agnostic_retrieval"
    assert frames["subspaces"][knowledge]["value"].between(0, 1).all()
    assert knowledge.sum() == (variants + 1) * languages * layers
    geometry = frames["geometry"]
    assert (geometry["metric"] == "cka").sum() == variants * languages * layers
    assert (geometry["metric"] == "own_specific_decoding").sum() == (variants + 1) * ((languages + 1) * layers + 1)
    assert (geometry["metric"] == "subspace_overlap_change").sum() == variants * (layers + 1)
    sparsity = frames["sparsity"].groupby("method", observed=True)["value"].mean()
    assert sparsity["wanda"] == 0.5
    assert (frames["perplexity"]["low"] <= frames["perplexity"]["high"]).all()


def test_neurons_are_made_of_the_readings_when_asked_for(finished):
    readings, columns = open_readings(finished)
    assert len(readings) == (1 + 5) * 3
    part = lape.neurons(readings, columns, layers=[2, 0], languages=["sw"], models=["dense", "magnitude-0.3-matrix"])
    assert len(part) == 2 * 2 * 48 * (1 + 1)
    assert set(part["layer"]) == {0, 2}
    whole = lape.neurons(readings, columns)
    assert len(whole) == (1 + 5) * 3 * 48 * (3 + 1)
    keys = [*VARIANT_COLUMNS, "language", "layer", "neuron", "metric"]
    both = part.astype({"language": object}).merge(whole.astype({"language": object}), on=keys, how="left")
    assert (both["value_x"] == both["value_y"]).all()


def test_report_stands_alone(finished):
    page = written(finished / "report.html")
    figures = list((finished / "figures").glob("*.png"))
    assert page.count("<img") == page.count('"data:image"') == len(figures) == 2 + 17 + 8 + 3
    assert not re.search("https?:", page)  # images in base64 have no colon, but may hold the letters by chance
    assert not re.search(r"\bnan\b", page)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome on this machine")
def test_report_works_in_a_browser_at_the_width_of_a_phone(finished, tmp_path):
    page = (finished / "report.html").read_text(encoding="utf-8")
    frame = f'<iframe style="width: 375px; height: 800px" srcdoc="{html.escape(page)}"></iframe>'
    outside = tmp_path / "outside.html"
    script = f"<script>addEventListener('load', () => setTimeout(() => {{ {LOOK} }}, 8000))</script>"
    outside.write_text(f"<!doctype html><meta charset=utf-8><title></title>{frame}{script}", encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--enable-logging=stderr",
            "--virtual-time-budget=10000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            outside.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said
    found = json.loads(html.unescape(re.search(r"<title>found(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert found["images"] == found["whole"] == len(list((finished / "figures").glob("*.png")))
    assert found["charts"] == found["places"] == 7
    shown = read_frame(finished / "frames" / "perplexity.parquet")
    shown = shown[(shown["metric"] == "perplexity") & (shown["method"] == "wanda") & (shown["language"] == "sw")]
    means = shown.groupby("calibration", observed=True)["value"].mean()
    assert {row[1]: float(row[3]) for row in found["cells"]} == pytest.approx(dict(means), rel=1e-3)
    assert {row[2] for row in found["cells"]} == {"sw"}
    assert found["missing"] == 0
    assert found["wide"] <= 0
    assert found["rising"] == sorted(found["before"])
    assert found["falling"] == found["rising"][::-1]
    assert found["sorted"] == "descending"


def test_every_figure_has_a_caption_that_says_what_was_measured(finished):
    page = written(finished / "report.html")
    captions = re.findall(r"<figcaption>(.*?)<small>", page, re.DOTALL)
    assert len(captions) == page.count("<img")
    assert min(map(len, captions)) > 60


def test_figures_are_there_as_pdf_and_png(finished):
    names = sorted(path.name for path in (finished / "figures").iterdir())
    assert {Path(name).suffix for name in names} == {".pdf", ".png"}
    assert len({Path(name).stem for name in names}) == len(names) / 2


def test_tables_are_there_as_csv_and_latex_and_on_the_page(finished):
    folder = finished / "tables"
    names = {path.stem for path in folder.glob("*.csv")}
    assert {path.stem for path in folder.iterdir()} == {*names, "preview", "methods", "references"}
    assert set(re.findall(r"\\input\{(.*)\.tex\}", (folder / "preview.tex").read_text())) == names
    kinds = {"perplexity", "bits-per-byte", "snr", "specific-error", "agnostic-error", "mask-overlap", "contrasts"}
    kinds |= {f"accuracy-bundled-{category}" for category in ("reasoning", "knowledge", "commonsense", "fluency")}
    assert {f"{kind}-wanda-0.5-row-pruned" for kind in kinds} <= names
    page = written(finished / "report.html")
    assert all(page.count(f'"tables/{name}.{kind}"') == 1 for name in names for kind in ("csv", "tex"))
    frame = read_frame(finished / "frames" / "perplexity.parquet")
    drawn = frame[(frame["metric"] == "perplexity") & (frame["method"] == "wanda") & (frame["calibration"] == "sw")]
    shown = pd.read_csv(folder / "perplexity-wanda-0.5-row-pruned.csv", index_col="calibration").loc["sw"]
    for language, values in drawn.groupby("language", observed=True)["value"]:
        assert len(values) == shown["draws"] == 2
        assert shown[language] == pytest.approx(values.sum() / 2)
        assert shown[f"{language}_sd"] == pytest.approx(abs(values.iloc[0] - values.iloc[1]) / 2**0.5)


PLOTS = {
    "perplexity": [plots.perplexity.matrix],
    "signal": [plots.signal.layers, plots.signal.matrix, plots.signal.roles],
    "geometry": [plots.geometry.layers],
    "subspaces": [plots.lsar.layers, plots.lsar.matrix, plots.lsar.knowledge],
    "mask_overlap": [plots.mask_overlap.heatmap, plots.mask_overlap.roles],
    "contrasts": [plots.contrasts.effects],
    "language_neurons": [plots.lape.layers],
    "neuron_entropy": [plots.lape.entropy],
    "neuron_shift": [plots.lape.shift],
}


@pytest.mark.parametrize("name", PLOTS)
def test_figures_fit_a_column_too(finished, tmp_path, name):
    frame = read_frame(finished / "frames" / f"{name}.parquet")
    recipe = next(recipe for recipe in recipes_of(frame) if recipe["method"] == "wanda")
    for plot in PLOTS[name]:
        figure = plot(frame, recipe, width=plots.COLUMN_WIDTH)
        assert figure.get_size_inches()[0] == plots.COLUMN_WIDTH
        files = plots.save(figure, tmp_path, plot.__name__)
        assert min(file.stat().st_size for file in files) > 2000
        renderer = FigureCanvasAgg(figure).get_renderer()
        for text in figure.texts:  # the title, and labels of the whole figure
            box = text.get_window_extent(renderer)
            assert box.x0 > -1, text.get_text()
            assert box.x1 < figure.bbox.x1 + 1, text.get_text()


def test_power_is_told_from_the_variances_of_a_finished_study(finished, tmp_path):
    table = tmp_path / "power.csv"
    result = prunescope("power", finished, "--effect", 50, "--runs", 100, "--csv", table)
    assert result.returncode == 0, result.stderr
    segments = load_study(finished / "study.toml").evaluation.segments
    assert f"Power 0.8 takes 2 draws of each set with {segments} segments" in " ".join(result.stdout.split())
    rows = pd.read_csv(table)
    assert sorted(rows["units"].unique()) == [segments, 2 * segments, 4 * segments]
    assert (rows["power"] == 1).all()
    nothing = study_power(finished, effect=0.0, runs=100)
    assert nothing["power"].mean() < 0.15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--comparison", "own"], "at least 4"),
        (["--comparison", "category"], "--metric accuracy_drop"),
        (["--metric", "margin_drop", "--category", "cooking"], "cooking"),
        (["--comparison", "category", "--metric", "margin_drop", "--category", "fluency"], "another one"),
    ],
)
def test_power_of_what_a_study_does_not_have_is_refused(finished, options, words):
    expect_one_line(prunescope("power", finished, "--effect", 1, *options), words)


def test_no_share_differs_by_more_than_one(finished):
    result = prunescope("power", finished, "--effect", 10, "--metric", "accuracy_drop")
    expect_one_line(result, "accuracy is a share", "from 0 to 1")


def test_power_cannot_be_told_from_a_single_draw(finished, tmp_path):
    for name in ("variants", "readings"):
        shutil.copytree(finished / name, tmp_path / name)
    shutil.copy(finished / "study.toml", tmp_path)
    again = [path for path in (tmp_path / "variants").iterdir() if Variant.open(path).columns()["seed"] == 1]
    for path in again:
        shutil.rmtree(path)
    expect_one_line(prunescope("power", tmp_path, "--effect", 1), "single draw", "calibration.seeds")


def test_second_run_repeats_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    result = prunescope("run", finished.parent / "study.toml", "--out", finished)
    assert result.returncode == 0
    assert "pruning" not in result.stderr
    assert "reading" not in result.stderr
    assert "loading" not in result.stderr
    before.pop(finished / ".lock", None)
    touched = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert touched <= {"provenance.json", "study.toml"}


@pytest.mark.parametrize("stages", [2, 3, 4, 5], ids=["pruning", "reading", "frames", "figures"])
def test_killed_run_goes_on_and_ends_with_the_same_bytes(place, finished, stages, tmp_path, request):
    out = tmp_path / "killed"
    command = [*COMMAND, "run", str(place / "study.toml"), "--out", str(out)]
    seen = 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            seen += line.startswith("[")
            if seen == stages:
                time.sleep(0.05)
                break
        os.kill(running.pid, signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in finished_files(out)}
    assert len(kept) < len(finished_files(finished))
    if stages < 5:  # killed while it draws, it must end with the same figures, too
        request.getfixturevalue("sketched")
    result = prunescope("run", place / "study.toml", "--out", out)
    assert result.returncode == 0, result.stderr
    compared = DATA if stages < 5 else RESULTS
    assert contents(out, *compared) == contents(finished, *compared)
    assert contents(out, "figures").keys() == contents(finished, "figures").keys()
    assert not list(out.rglob("*" + PARTIAL))
    assert all(path.stat().st_mtime_ns == t for path, t in kept.items())


@pytest.mark.usefixtures("sketched")
def test_changed_study_redoes_only_what_it_touches(place, finished, tmp_path):
    out = tmp_path / "changed"
    shutil.copytree(finished, out)
    (place / "more.toml").write_text(STUDY.replace('sets = ["en",', 'sets = ["zh", "en",'))
    before = {path: path.stat().st_mtime_ns for path in (out / "variants").rglob("*") if path.is_file()}
    result = prunescope("run", place / "more.toml", "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("] pruning") == 1
    assert "pruning 1 variant: wanda; zh (seed 0)" in result.stderr
    assert all(path.stat().st_mtime_ns == t for path, t in before.items())
    frame = read_frame(out / "frames" / "perplexity.parquet")
    assert "zh" in set(frame["calibration"])


@pytest.mark.usefixtures("sketched")
def test_figures_and_tables_that_a_changed_study_no_longer_has_are_removed(place, finished, tmp_path):
    out = tmp_path / "fewer"
    shutil.copytree(finished, out)
    (out / "figures" / "mine.pdf").write_text("precious")
    recipe = '[[recipes]]\nmethod = "magnitude"\nsparsity = 0.3\n'
    assert recipe in STUDY
    (place / "fewer.toml").write_text(STUDY.replace(recipe, ""))
    result = prunescope("run", place / "fewer.toml", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "files of figures and tables that this study no longer has" in result.stderr
    for kind in ("figures", "tables"):
        there = {path.relative_to(out).as_posix() for path in (out / kind).iterdir()} - {"figures/mine.pdf"}
        listed = {file for record in Records(out).everything().values() for file in record.files}
        assert {file for file in listed if file.startswith(f"{kind}/")} == there
        assert not any("magnitude" in name for name in there)
        assert any("magnitude" in path.name for path in (finished / kind).iterdir())
    assert (out / "figures" / "mine.pdf").read_text() == "precious"
    assert (out / "variants" / "magnitude-0.3-matrix" / "masks.safetensors").is_file()  # reused if it is asked again


@pytest.mark.usefixtures("sketched")
def test_counting_the_first_token_reads_again_and_is_on_record(place, finished, tmp_path):
    out = tmp_path / "counted"
    shutil.copytree(finished, out)
    (place / "counted.toml").write_text(STUDY.replace("[evaluation]", "[evaluation]\nskip_first = false"))
    result = prunescope("run", place / "counted.toml", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "] reading en" in result.stderr
    assert "] pruning" not in result.stderr
    records = [json.loads((folder / "provenance.json").read_text())["skip_first"] for folder in (finished, out)]
    assert records == [True, False]
    assert "(BOS, if there is one) included" in written(out / "report.html")
    before, after = (read_frame(folder / "frames" / "signal.parquet")["value"] for folder in (finished, out))
    assert (before != after).mean() > 0.9


@pytest.mark.usefixtures("sketched")
def test_a_variant_that_cannot_be_made_keeps_no_other_from_being_read(place, tmp_path):
    text = STUDY.replace('"model"', f'"{place / "model"}"', 1).replace('["en", "sw", "all"]', '["en"]', 1)
    text = text.replace('extra = [["sw", 1]]\n', "", 1).replace("[evaluation]", UNREACHABLE + "[evaluation]", 1)
    (tmp_path / "study.toml").write_text(text)
    for _ in range(2):
        result = prunescope("run", tmp_path / "study.toml", "--out", tmp_path / "out")
        assert result.returncode == 0, result.stderr
        assert "set aside: wanda-0.01-row-owl-pruned-en-s0: sparsity 0.01 with a spread" in result.stderr
        read = read_frame(tmp_path / "out" / "frames" / "perplexity.parquet")
        assert set(read.method) == {"dense", "wanda", "magnitude"}
        assert set(read.sparsity) == {0.0, 0.3, 0.5}
        page = written(tmp_path / "out" / "report.html")
        assert "wanda-0.01-row-owl-pruned-en-s0 could not be made: sparsity 0.01 with a spread" in page
    assert {path.name for path in (tmp_path / "out" / "variants").iterdir()} == {
        "magnitude-0.3-matrix",
        "wanda-0.5-row-pruned-en-s0",
    }


@pytest.mark.parametrize(
    "name",
    [
        "frames/signal.parquet",
        "variants/magnitude-0.3-matrix/masks.safetensors",
        "readings/dense/en.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_file_in_a_study_folder_is_made_again(finished, tmp_path, name, damage):
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    whole = (out / name).read_bytes()
    damaged = whole[: len(whole) // 2] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1])
    (out / name).write_bytes(damaged)
    result = prunescope("run", finished.parent / "study.toml", "--out", out)
    assert result.returncode == 0, result.stderr
    assert f"{out / name} was modified or truncated after it was written" in result.stderr
    assert (out / name).read_bytes() == whole
    assert (out / "altered" / name).read_bytes() == damaged
    assert contents(out, *RESULTS) == contents(finished, *RESULTS)


def test_a_study_whose_every_file_was_damaged_is_made_again(finished, tmp_path):
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    everything = {file for record in Records(out).everything().values() for file in record.files}
    assert len(everything) > 100
    for name in everything:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = prunescope("run", finished.parent / "study.toml", "--out", out)
    assert result.returncode == 0, result.stderr
    assert contents(out, *RESULTS) == contents(finished, *RESULTS)
    assert {
        p.relative_to(out / "altered").as_posix() for p in (out / "altered").rglob("*") if p.is_file()
    } == everything


def test_a_folder_that_another_run_writes_into_is_refused(place, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"):
        result = prunescope("run", place / "study.toml", "--out", tmp_path)
    expect_one_line(result, "another run is writing")


def test_a_model_larger_than_memory_is_read_from_its_shards(place, finished, tmp_path, monkeypatch):
    from analysis.study import model

    monkeypatch.setattr(model, "_ROOM", 1 << 40)
    result = prunescope("run", place / "study.toml", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert ", one block at a time" in result.stderr
    assert "reading plan: 6 models" in result.stderr
    assert contents(tmp_path / "out", *RESULTS) == contents(finished, *RESULTS)


def test_a_result_with_a_damaged_record_is_made_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    record = tmp_path / "out" / "records" / "frames" / "signal.json"
    record.write_text(record.read_text()[:-20])
    result = prunescope("run", finished.parent / "study.toml", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert f"{record} is damaged" in result.stderr
    assert contents(tmp_path / "out", *RESULTS) == contents(finished, *RESULTS)


def test_a_study_folder_of_an_older_layout_is_recognised(finished, tmp_path):
    (tmp_path / "provenance.json").write_text('{"stages": {"fit": {"key": "a", "seconds": 1.0, "files": {}}}}')
    before = list(tmp_path.iterdir())
    result = prunescope("run", finished.parent / "study.toml", "--out", tmp_path)
    expect_one_line(result, "older version of prunescope", "choose another folder (--out)")
    assert [path for path in tmp_path.iterdir() if path.name != ".lock"] == before


def test_a_moved_study_is_not_made_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out", copy_function=shutil.copyfile)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    result = prunescope("run", finished.parent / "study.toml", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "[" not in result.stderr
    touched = {p for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert not any(
        {"frames", "figures", "readings", "variants"} & set(path.parts)
        for path in touched
        if "records" not in path.parts
    )


def test_other_code_makes_again_what_it_makes(finished, tmp_path, monkeypatch):
    """Other code for frames, say: nothing is pruned or read again, and the model is not loaded."""
    from analysis.study import frames as stage

    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(stage, "code_version", lambda *packages: "another version")
    result = prunescope("run", finished.parent / "study.toml", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "making the frame perplexity" in result.stderr
    assert "pruning" not in result.stderr
    assert "reading" not in result.stderr
    assert contents(tmp_path / "out", *RESULTS) == contents(finished, *RESULTS)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"zh"]', '"ko"]', ("Korean", "bundled corpus has")),
        ('"zh"]', '"chinese"]', ("unknown language tag", "did you mean")),
        ("segments = 8\nfit", "segments = 999\nfit", ("999 heldout segments", "there are 160")),
        ("samples = 6", "samples = 100000", ("100000 samples", "enough for")),
        ('method = "wanda"', 'method = "wnada"', ("did you mean",)),
        ("sparsity = 0.5", "sparsity = 50", ("not between 0 and 1",)),
        ("segments = 6", "segmets = 6", ("unknown key",)),
        ('model = "model"', 'model = "nowhere"', ("cannot load model",)),
        ('model = "model"', 'model = "model"\ndevice = "cuda:7"', ('no device "cuda:7"', "it has cpu")),
    ],
)
def test_mistakes_are_one_line_and_status_two(place, tmp_path, old, new, words):
    study = place / "wrong.toml"
    study.write_text(STUDY.replace(old, new, 1))
    expect_one_line(prunescope("run", study, "--out", tmp_path / "out"), *words)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("command", ["run", "prune"])
@pytest.mark.parametrize(
    ("option", "amount", "words"),
    [
        ("--device-memory", "2GiB", ("--device-memory caps the memory of a GPU", "on the CPU", "use --memory")),
        ("--device-memory", "two", ('--device-memory "two" is not an amount of memory', "6GiB")),
        ("--memory", "1MiB", ("cannot hold one block",)),
    ],
)
def test_caps_that_cannot_be_are_one_line(place, tmp_path, command, option, amount, words):
    result = prunescope(command, place / "study.toml", "--out", tmp_path / "out", option, amount)
    expect_one_line(result, *words)
    assert nothing_was_made(tmp_path / "out")


def test_unknown_architecture_is_one_line(place, tmp_path):
    from conftest import tiny_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", hidden_size=8, num_hidden_layers=1, vocab_size=300, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "study.toml").write_text(STUDY)
    expect_one_line(prunescope("run", tmp_path / "study.toml", "--out", tmp_path / "o"), '"mamba"')


@pytest.mark.usefixtures("sketched")
def test_full_disk_is_one_line_and_the_run_goes_on_afterwards(place, finished, tmp_path):
    """A file size limit stands in for a full disk: the kernel refuses the write in the same way."""
    import resource

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "out"
    command = [*COMMAND, "run", str(place / "study.toml"), "--out", str(out)]
    result = subprocess.run(command, preexec_fn=small_files, capture_output=True, text=True, timeout=300, check=False)
    expect_one_line(result, "no space left")
    assert not list(out.rglob("*" + PARTIAL))
    assert prunescope("run", place / "study.toml", "--out", out).returncode == 0
    assert contents(out, *DATA) == contents(finished, *DATA)
    assert contents(out, "figures").keys() == contents(finished, "figures").keys()


def test_export_writes_a_checkpoint_and_refuses_what_it_must(finished, tmp_path):
    from transformers import AutoModelForCausalLM

    variant = "wanda-0.5-row-pruned-sw-s0"
    target = tmp_path / "checkpoint"
    result = prunescope("export", finished, target, "--variant", variant)
    assert result.returncode == 0, result.stderr
    weight = AutoModelForCausalLM.from_pretrained(target).model.layers[0].mlp.up_proj.weight
    assert int((weight == 0).sum()) * 2 == weight.numel()
    expect_one_line(prunescope("export", finished, target, "--variant", variant), "not empty")
    expect_one_line(
        prunescope("export", finished, tmp_path / "x", "--variant", "wanda-0.5"),
        "there is no variant",
        "known:",
    )


def test_masks_of_another_model_are_refused(finished, tmp_path):
    from conftest import tiny_model, tiny_tokenizer

    shutil.copytree(finished, tmp_path / "out")
    tiny_model(seed=9).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    study = tmp_path / "out" / "study.toml"
    study.write_text(study.read_text().replace(str(finished.parent / "model"), str(tmp_path / "model")))
    result = prunescope("export", tmp_path / "out", tmp_path / "c", "--variant", "magnitude-0.3-matrix")
    expect_one_line(result, "belongs to another model")
    assert not (tmp_path / "c").exists()


def test_frames_read_into_pandas_as_they_are(finished):
    frame = pd.read_parquet(finished / "frames" / "perplexity.parquet")
    assert list(frame.columns) == list(FRAMES["perplexity"].columns)
