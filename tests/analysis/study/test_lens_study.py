"""A study with a lens: what it reads, what it costs, and what adding one to a finished study reads again."""

from __future__ import annotations

import pytest
import torch
from studies import STUDY

from analysis.frames import read_frame
from analysis.study import read
from analysis.study.context import Context
from analysis.study.frames import MakeFrames
from analysis.study.planning.estimates import by_stage
from analysis.study.planning.plan import plan_study
from analysis.study.prune import Prune
from analysis.study.read import Read, lens_readings
from analysis.study.study_file import load_study
from probes import DENSE
from pruning.errors import StudyError

LENS = "[lens]\ntokens = 40\n"
SMALL = STUDY.replace('"en", "sw", "zh"]', '"en", "sw"]').replace('["en", "sw", "all"]', '["en"]')
SMALL = SMALL.replace('extra = [["sw", 1]]\n', "").replace("per_category = 2", 'items = "none"')


def run(study, folder, *stages, workers=1):
    """Run stages without figures or a report; return the context and the names of results, unit by unit."""
    context = Context(study, folder, workers=workers)
    made = []
    for stage in stages:
        for unit in stage.units(context):
            done = []
            stage.run(context, unit, done.append)
            made.append({output.name for output in unit.outputs})
    return context, made


def study(place, folder, more=""):
    (folder / "study.toml").write_text(SMALL.replace('model = "model"', f'model = "{place / "model"}"') + more)
    return load_study(folder / "study.toml")


def test_a_lens_that_is_added_later_is_read_alone_and_gives_the_same(place, tmp_path):
    for name in ("first", "later"):
        (tmp_path / name).mkdir()
    with_lens = study(place, tmp_path, LENS)
    folder = tmp_path / "first"
    planned = by_stage(plan_study(with_lens, folder).estimates)
    context, made = run(with_lens, folder, Prune(), Read())
    names = set().union(*made)
    models = [DENSE, *context.variants.names]
    expected = {f"{kind}/{model}/{lang}" for model in models for lang in ("en", "sw") for kind in ("readings", "lens")}
    assert names >= expected
    taken = sum(path.stat().st_size for path in (folder / "readings").rglob("*.safetensors"))
    assert sum(one.kept for one in planned["read"]) == pytest.approx(taken, rel=0.15)
    together = lens_readings(context)

    without = study(place, tmp_path)
    before, made = run(without, tmp_path / "later", Prune(), Read())
    assert not any(name.startswith("lens/") for names in made for name in names)
    assert lens_readings(before) == {}
    after, made = run(with_lens, tmp_path / "later", Read())
    assert set().union(*made) == {name for name in expected if name.startswith("lens/")}
    alone = lens_readings(after)
    assert alone.keys() == together.keys()
    for key, own in together.items():
        torch.testing.assert_close(own.sums, alone[key].sums)
        torch.testing.assert_close(own.mass, alone[key].mass)

    _, again = run(with_lens, folder, Read())
    assert again == []
    context, _ = run(with_lens, folder, MakeFrames())
    frame = context.folder / "frames" / "lens.parquet"
    assert frame.is_file()
    _, made = run(study(place, tmp_path, LENS.replace("40", "30")), folder, MakeFrames(), Read())
    assert {name.partition("/")[0] for names in made for name in names} == {"frames", "lens"}


def test_a_lens_costs_what_its_products_with_the_head_cost(place, tmp_path):
    reading = [
        sum(unit.work for unit in Read().units(Context(study(place, tmp_path, more), tmp_path / "none", written=False)))
        for more in ("", LENS)
    ]
    context = Context(study(place, tmp_path, LENS), tmp_path / "none", written=False)
    facts, models = context.model.facts, len(context.variants.models)
    tokens = sum(
        batch.n_tokens for text in context.texts.heldout.values() for batch in context.model.session.batches(text)
    )
    at_head = 2 * models * 2 * 40 * facts.blocks * facts.head
    assert reading[1] - reading[0] == pytest.approx(at_head + tokens * facts.body)


def test_a_tuned_lens_is_fitted_once_and_read_beside_the_other(place, tmp_path):
    tuned = study(place, tmp_path, LENS + "tuned = true\n")
    folder = tmp_path / "out"
    planned = by_stage(plan_study(tuned, folder).estimates)["read"]
    context, made = run(tuned, folder, Prune(), Read())
    taken = sum(path.stat().st_size for path in (folder / "readings").rglob("*") if path.is_file())
    assert sum(one.kept for one in planned) == pytest.approx(taken, rel=0.15)
    facts, width = context.model.facts, context.model.anatomy.hidden_size
    positions = min(4 * width // 2, 6 * 39)  # of each of two languages, of segments of at most 40 tokens
    assert 0 < sum(one.scratch for one in planned) <= 2 * positions * facts.blocks * width * 4
    files = sorted((folder / "readings" / DENSE / "translators").iterdir())
    assert [path.stem for path in files] == [str(layer) for layer in range(facts.blocks - 1)]
    when = [path.stat().st_mtime_ns for path in files]
    for own in lens_readings(context).values():
        assert len(own.sums) == 2
        torch.testing.assert_close(own.sums[0, -1], own.sums[1, -1])
        assert not torch.allclose(own.sums[0, 0], own.sums[1, 0])

    context, made = run(
        study(place, tmp_path, LENS.replace("40", "30") + "tuned = true\n"), folder, Read(), MakeFrames()
    )
    assert any(name.startswith("lens/") for names in made for name in names)
    assert [path.stat().st_mtime_ns for path in files] == when
    frame = read_frame(folder / "frames" / "lens.parquet")
    assert set(frame["lens"].dropna()) == {"logit", "tuned"}
    shares = frame[frame["metric"] == "translated_share"].set_index("layer")["value"]
    assert shares.index.tolist() == list(range(facts.blocks))
    assert shares.iloc[-1] == 1
    assert shares.is_monotonic_increasing


def test_a_tuned_lens_needs_tokens(place, tmp_path):
    with pytest.raises(StudyError, match="tokens = 256"):
        study(place, tmp_path, "[lens]\ntuned = true\n")


def test_more_workers_than_languages_read_some_models_each_and_get_the_same(place, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_FEWEST", 1)
    content, files = study(place, tmp_path, LENS), {}
    for workers in (1, 6):
        folder = tmp_path / str(workers)
        folder.mkdir()
        context, made = run(content, folder, Prune(), workers=workers)
        context, made = run(content, folder, Read(), workers=workers)
        models = {DENSE, *context.variants.names}
        parts = len(models) if workers > 1 else 1  # three parts of each language, as far as there are models
        assert len(made) == (2 * min(3, parts) if workers > 1 else 1)
        assert sum(map(len, made)) == len(set().union(*made))  # no result twice
        found = (path for path in (folder / "readings").rglob("*.safetensors"))
        files[workers] = {str(path.relative_to(folder)): path.read_bytes() for path in found}
    assert files[1] == files[6]


def test_a_tuned_lens_is_not_cut_by_models(place, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_FEWEST", 1)
    content = study(place, tmp_path, LENS + "tuned = true\n")
    units = Read().units(Context(content, tmp_path / "none", written=False, workers=6))
    assert len(units) == 2
