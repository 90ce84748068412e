"""Fine-tuning after pruning: what moves, how, and that nothing else does."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from checkpoints import CORPUS, SHORT, checkpoint
from conftest import tiny_model
from pairwise import pairwise
from torch.func import functional_call

from pruning import Anatomy, CalibrationSet, Corpus, Recipe, SetAsideWarning, Variant, load_model, prune
from pruning.engine import jobs, plan, planned_jobs, recovering
from pruning.engine.recovering import recovery_work
from pruning.errors import RecipeError, TextError
from pruning.runner import PruningRun
from pruning.text.calibration import CalibrationText
from pruning.text.sources import FileText
from pruning.variants.owner import DenseModel

sweep = import_module("pruning.engine.sweep")  # the function of this name hides it
EN = CalibrationSet.named("en", samples=6, length=24, seed=1)
RECOVERIES = ["lora", "fine-tune"]


def recipe(recover: str, method: str = "wanda", **more) -> Recipe:
    settings = {"steps": 3, "batch": 6, "rate": 1e-2} | more.pop("parameters", {})
    return Recipe(method=method, sparsity=0.5, recover=recover, parameters=settings, **more)


def weights(variant: Variant, model) -> dict:
    anatomy = Anatomy(model)
    return {key: variant.weight(key, anatomy.weight(*key)) for key in variant.masks}


def masked(kept, w, scale, a=None, b=None):
    return torch.where(kept, w if a is None else w + scale * b @ a, 0)


def naive(model, variant, sequences, lora: bool, rate: float, steps: int, rank=4, alpha=10.0, decay=0.1):
    """Return weights after AdamW on the mean token loss, in float64, its formulas written out; all text every step."""
    model = tiny_model().double()
    anatomy = Anatomy(model)
    masks = {key: variant.masks[key] for key in variant.masks}
    start = {key: anatomy.weight(*key).clone() for key in masks}
    trained = {}
    for key in masks:
        if lora:
            generator = torch.Generator().manual_seed((EN.seed << 32) + jobs.projection_seed(key))
            a = (2 * torch.rand(rank, start[key].shape[1], generator=generator) - 1) / start[key].shape[1] ** 0.5
            trained[key] = [a.double(), torch.zeros(len(start[key]), rank, dtype=torch.float64)]
        else:
            trained[key] = [start[key].clone()]

    def weight(key):
        if lora:
            return masked(masks[key], start[key], alpha / rank, *trained[key])
        return masked(masks[key], trained[key][0], 0)

    names = {f"{anatomy.path(*key)}.weight": key for key in masks}
    moments = {key: [(torch.zeros_like(p), torch.zeros_like(p)) for p in ps] for key, ps in trained.items()}
    for step in range(steps):
        for parameters in trained.values():
            for p in parameters:
                p.requires_grad_(True)
        output = functional_call(
            model, {name: weight(key) for name, key in names.items()}, kwargs={"input_ids": sequences}
        )
        right = output.logits.log_softmax(-1)[:, :-1].gather(-1, sequences[:, 1:, None])
        flat = [p for ps in trained.values() for p in ps]
        gradients = torch.autograd.grad(-right.mean(), flat)
        norm = sum(float((g**2).sum()) for g in gradients) ** 0.5
        gradients = iter([g / max(1, norm) for g in gradients])
        now = rate * (1 - step / steps)
        for key, parameters in trained.items():
            for place, p in enumerate(parameters):
                g = next(gradients)
                first, second = moments[key][place]
                first = 0.9 * first + 0.1 * g
                second = 0.999 * second + 0.001 * g * g
                moments[key][place] = first, second
                mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                moved = p.detach() * (1 - now * decay) - now * mean / (square.sqrt() + 1e-8)
                parameters[place] = moved
    return {key: weight(key).detach() for key in masks}


@pytest.mark.parametrize("recover", RECOVERIES)
def test_weights_are_those_of_adamw_written_out_in_float64(model, tokenizer, recover):
    settings = {"decay": 0.1} | ({"rank": 4, "alpha": 10} if recover == "lora" else {})
    (variant,) = prune(model, tokenizer, recipe(recover, parameters=settings), CORPUS, EN)
    text = CalibrationText.draw(tokenizer, CORPUS, [EN])
    (sequences,) = (text.tokens[piece] for piece in text.pieces[EN])
    (plain,) = prune(model, tokenizer, Recipe(method="wanda", sparsity=0.5), CORPUS, EN)
    assert variant.masks == plain.masks
    found, before = weights(variant, model), weights(plain, model)
    expected = naive(model, plain, sequences, recover == "lora", 1e-2, 3)
    for key, weight in found.items():
        moved = (expected[key] - before[key]).norm()
        assert moved > 0.01 * before[key].norm()
        assert (weight - expected[key]).norm() < 1e-3 * moved, key


@pairwise(
    {"kind": ["llama", "gpt_neox", "gpt2", "mixtral", "mt5"], "recover": RECOVERIES, "method": ["magnitude", "snip"]}
)
def test_the_loss_falls_and_nothing_moves_but_kept_weights(kind, recover, method, tokenizer):
    model = tiny_model(kind)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    plain, variant = (
        prune(model, tokenizer, one, CORPUS, EN)[0]
        for one in (
            Recipe(method=method, sparsity=0.5),
            recipe(recover, method, parameters={"steps": 6, "batch": 4, "rate": 0.02}),
        )
    )
    assert variant.masks == plain.masks
    assert variant.bits() == plain.bits()
    assert variant.columns()["method"] == f"{method}+{recover}(batch=4, rate=0.02, steps=6)"
    for key, weight in weights(variant, model).items():
        assert not weight[~variant.masks[key]].any()
        if not key[1].startswith(("gate.", "up.", "down.")):  # no token may have been routed to an expert
            assert not torch.equal(weight, weights(plain, model)[key])
    losses = []
    text = CalibrationText.draw(tokenizer, CORPUS, [EN])
    sequences = torch.cat([text.tokens[piece] for piece in text.pieces[EN]])
    for one in (plain, variant):
        with one.applied(model), torch.no_grad():
            asked = {"input_ids": sequences, "labels": sequences}
            if kind == "mt5":
                asked = {"input_ids": sequences[:, :12], "labels": sequences[:, 12:].contiguous()}
            losses.append(float(model(**asked).loss))
    assert losses[1] < losses[0] - 0.1
    assert f"was {losses[0]:.4f} before and {losses[1]:.4f} after" in variant.record.remarks[-1]
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_training_starts_from_the_weights_that_other_steps_made(model, tokenizer):
    still = {"rate": 1e-9, "steps": 1}
    recipes = [
        Recipe(method="sparsegpt", sparsity=0.5),
        recipe("fine-tune", "sparsegpt", parameters=still),
        Recipe(method="wanda", sparsity=0.5, refinement="swaps", correction="admm"),
        recipe("lora", refinement="swaps", correction="admm", parameters=still),
    ]
    variants = prune(model, tokenizer, recipes, CORPUS, EN)
    for plain, recovered in (variants[:2], variants[2:]):
        assert recovered.masks == plain.masks
        before, after = weights(plain, model), weights(recovered, model)
        for key, weight in after.items():
            torch.testing.assert_close(weight, before[key], rtol=0, atol=1e-7)


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude", "snip"])
def test_what_is_fine_tuned_in_several_ways_is_chosen_once(tokenizer, tmp_path, monkeypatch, method, in_folder):
    """The choice is that of each recipe alone, whether it is made together, before, or not kept at all."""
    model, real, calls = tiny_model(), sweep.choose, []

    def counted(anatomy, layer, chosen, *more):
        calls.append((layer, chosen.method_label))
        return real(anatomy, layer, chosen, *more)

    monkeypatch.setattr(sweep, "choose", counted)
    tuned = [recipe("lora", method), recipe("fine-tune", method), recipe("lora", method, parameters={"steps": 2})]
    alone = [prune(model, tokenizer, one, CORPUS, EN)[0] for one in tuned]
    plain = Recipe(method=method, sparsity=0.5)
    for recipes in (tuned, [*tuned, plain], [plain, *tuned]):
        calls.clear()
        place = {"folder": tmp_path / str(len(recipes)) / recipes[0].method_label} if in_folder else {}
        made = {v.record.recipe: v for v in prune(model, tokenizer, recipes, CORPUS, EN, **place)}
        assert sorted(calls) == [(layer, method) for layer in range(3)]
        for one, expected in zip(tuned, alone, strict=True):
            assert made[one].masks == expected.masks
            assert made[one].record.remarks == expected.record.remarks
            assert made[one].values.keys() == expected.values.keys()
            assert all(torch.equal(made[one].values[key], value) for key, value in expected.values.items())
        if plain in recipes:
            assert made[plain].masks == alone[0].masks
            assert not made[plain].record.recipe.recovers


def test_a_finished_variant_is_fine_tuned_without_choosing_anew(model, tokenizer, tmp_path, monkeypatch):
    plain, tuned = Recipe(method="sparsegpt", sparsity=0.5), recipe("fine-tune", "sparsegpt")
    (expected,) = prune(model, tokenizer, tuned, CORPUS, EN)
    (first,) = prune(model, tokenizer, plain, CORPUS, EN, folder=tmp_path)

    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(sweep, "choose", never)
    ticks: list[int] = []
    _, second = prune(model, tokenizer, [plain, tuned], CORPUS, EN, folder=tmp_path, progress=ticks.append)
    assert second.masks == expected.masks == first.masks
    assert all(torch.equal(second.values[key], value) for key, value in expected.values.items())
    assert sum(ticks) == recovery_work(Anatomy(model), planned_jobs([tuned], [EN]))
    assert not (tmp_path / "scratch").exists()


def test_a_cap_does_not_part_what_is_fine_tuned_from_one_choice():
    recipes = [Recipe(method="wanda", sparsity=0.5), Recipe(method="ria", sparsity=0.5), recipe("lora", "ria")]
    planned = planned_jobs([*recipes, recipe("lora")], [EN, SHORT])
    for count in (1, 2, 4, 8):
        waves = plan._cut(planned, count)
        assert len(waves) == min(count, 4)
        assert sorted(job.id for wave in waves for job in wave) == sorted(job.id for job in planned)
        assert len(jobs.choices(planned)) == sum(len(jobs.choices(wave)) for wave in waves) == 4


def test_steps_that_bfloat16_cannot_hold_are_not_lost_in_it(tokenizer):
    """Steps of 1e-5 are less than half a unit in the last place of most weights."""
    model = tiny_model().to(torch.bfloat16)
    many = recipe("fine-tune", roles=("down",), parameters={"rate": 1e-5, "steps": 60, "batch": 1})
    (variant,) = prune(model, tokenizer, many, CORPUS, EN)
    moved = total = 0
    for key, weight in weights(variant, model).items():
        kept = variant.masks[key]
        assert variant.values[key].dtype == torch.bfloat16
        large = kept & (Anatomy(model).weight(*key).abs() > 0.01)  # half a unit is at least 1.5e-5 there
        moved += int((weight != Anatomy(model).weight(*key))[large].sum())
        total += int(large.sum())
    assert moved > 0.05 * total


@pytest.mark.parametrize(("kind", "recover"), [("llama", "fine-tune"), ("mt5", "lora")])
def test_recomputing_activations_changes_nothing(kind, recover, tokenizer, monkeypatch):
    model = tiny_model(kind)
    few = recipe(recover, parameters={"steps": 2, "batch": 2})
    (plain,) = prune(model, tokenizer, few, CORPUS, SHORT)
    forwards = [vars(block).get("forward") for block in Anatomy(model).blocks]
    monkeypatch.setattr(recovering, "GRADIENT_TOKENS", 8)
    passes: list[int] = []
    monkeypatch.setattr(recovering, "checkpoint", counted(recovering.checkpoint, passes))
    (again,) = prune(model, tokenizer, few, CORPUS, SHORT)
    assert len(passes) == 2 * 2 * len(Anatomy(model).blocks)  # one sequence at a time
    assert [vars(block).get("forward") for block in Anatomy(model).blocks] == forwards
    before, after = weights(plain, model), weights(again, model)
    for key, weight in after.items():
        moved = (weight - Anatomy(model).weight(*key))[plain.masks[key]].norm()
        assert (weight - before[key]).norm() < 1e-3 * moved, key


def counted(function, calls):
    def call(*arguments, **named):
        calls.append(1)
        return function(*arguments, **named)

    return call


def test_every_sequence_is_seen_once_before_one_is_seen_again():
    batches = recovering._batches(7, 5, 3, seed=2)
    assert [len(batch) for batch in batches] == [3] * 5
    seen = torch.cat(list(batches)).tolist()
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7))
    assert seen[:7] != list(range(7))
    assert not torch.equal(torch.cat(list(recovering._batches(7, 5, 3, seed=3))), torch.cat(list(batches)))


@pytest.mark.parametrize(
    ("settings", "recover"),
    [
        ({"method": "flap", "allocation": "uniform"}, "lora"),
        ({"method": "magnitude", "pattern": "neurons"}, "fine-tune"),
        ({"method": "block-influence"}, "lora"),
    ],
)
def test_whole_structures_stay_away_and_are_cut_out_of_the_checkpoint(tokenizer, tmp_path, settings, recover):
    model = tiny_model(num_hidden_layers=4, attention_bias=True, mlp_bias=True)
    (variant,) = prune(model, tokenizer, recipe(recover, **settings), CORPUS, EN)
    assert "smaller" in variant.export(model, tokenizer, tmp_path / "out")
    assert "the others were fine-tuned" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    smaller, _ = load_model(str(tmp_path / "out"))
    ids = torch.arange(3, 40)[None]
    with variant.applied(model):
        torch.testing.assert_close(smaller(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_killed_anywhere_trains_that_variant_again_and_harms_no_other(model, tokenizer, tmp_path):
    few = {"roles": ("o", "down"), "parameters": {"steps": 2}}
    recipes = [
        recipe("lora", **few),
        Recipe(method="wanda", sparsity=0.5),
        recipe("fine-tune", "magnitude", **few),
    ]
    held = prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny")
    for variant in held:
        variant.save(tmp_path / "held" / "variants" / variant.id)
    ticks: list[int] = []
    whole = tmp_path / "whole"
    prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny", folder=whole, progress=ticks.append)
    assert files(whole) == files(tmp_path / "held")
    run = PruningRun(Anatomy(model), tokenizer, planned_jobs(recipes, [SHORT]), CORPUS, tmp_path / "new")
    assert sum(ticks) == sum(wave.tokens for wave in run.waves)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for at in range(len(ticks) // 6, len(ticks), len(ticks) // 3):
        left = [at]

        def kill(tokens: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        out = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny", folder=out, progress=kill)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        done = {path: path.stat().st_mtime_ns for path in (out / "variants").rglob("*.*")}
        again: list[int] = []
        prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny", folder=out, progress=again.append)
        assert files(out) == files(whole)
        assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_a_variant_whose_loss_explodes_is_set_aside_with_advice(model, tokenizer, tmp_path, monkeypatch):
    real, calls = recovering.token_loss, []

    def exploding(anatomy, ids):
        calls.append(1)
        return real(anatomy, ids) * (torch.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(recovering, "token_loss", exploding)
    recipes = [recipe("lora"), recipe("fine-tune")]
    ticks: list[int] = []
    with pytest.warns(
        SetAsideWarning, match=r"lora.* is not finite; it was .* at the start; lower rate, which is 0.01"
    ):
        made = prune(model, tokenizer, recipes, CORPUS, SHORT, folder=tmp_path, progress=ticks.append)
    assert [variant.record.recipe for variant in made] == recipes[1:]
    assert len(json.loads((tmp_path / "set_aside.json").read_text())) == 1
    run = PruningRun(Anatomy(model), tokenizer, planned_jobs(recipes, [SHORT]), CORPUS, None)
    assert sum(ticks) == sum(wave.tokens for wave in run.waves)


def test_it_takes_the_whole_model_in_a_dtype_that_holds_gradients(tmp_path, tokenizer):
    streamed, _ = load_model(str(checkpoint(tmp_path)), stream=True)
    with pytest.raises(RecipeError, match='recover = "lora" trains on the loss, so the whole model must be in memory'):
        prune(streamed, tokenizer, recipe("lora"), CORPUS, SHORT)
    with pytest.raises(RecipeError, match="float16 has; load the model with dtype bfloat16 or float32"):
        prune(tiny_model().to(torch.float16), tokenizer, recipe("lora"), CORPUS, SHORT)
    with pytest.raises(RecipeError, match=r"magnitude\+lora.* needs calibration text; give a corpus"):
        prune(tiny_model(), tokenizer, recipe("lora", "magnitude"))


def test_text_that_holds_what_is_held_out_is_refused_where_it_would_be_trained_on(model, tokenizer, tmp_path):
    for part in ("calibration", "heldout"):
        lines = [segment.text for segment in CORPUS.segments(part, "en")]
        (tmp_path / f"{part}-en.txt").write_text("\n".join(lines), encoding="utf-8")
    with (tmp_path / "calibration-en.txt").open("a", encoding="utf-8") as file:
        file.write("\n" + lines[3].upper())
    sources = [FileText(path=f"{tmp_path}/{part}-{{lang}}.txt") for part in ("calibration", "heldout")]
    corpus = Corpus(sources[0], sources[0], sources[1])
    with pytest.raises(
        TextError, match=r'overlaps held-out text in English.* segment "321" holds held-out segment "4";'
    ):
        prune(model, tokenizer, recipe("lora"), corpus, EN)
    assert prune(model, tokenizer, Recipe(method="wanda", sparsity=0.5), corpus, EN)


def test_work_counts_the_recomputed_pass(model):
    few = recipe("lora", parameters={"steps": 10, "batch": 2})
    anatomy = Anatomy(model)
    sets = [CalibrationSet.named("en", samples=4, length=length) for length in (256, 257)]
    work = [recovery_work(anatomy, planned_jobs([few], [one])) for one in sets]
    assert work == [3 * (10 * 2 * 256 * 3 + 2 * 4 * 256), 3 * (10 * 2 * 257 * 4 + 2 * 4 * 257)]
    assert recovery_work(anatomy, planned_jobs([Recipe(method="wanda", sparsity=0.5)], sets[:1])) == 0


@pytest.mark.parametrize("recover", RECOVERIES)
def test_the_dense_model_is_there_again_if_saving_fails(model, tokenizer, recover):
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    (plain,) = prune(model, tokenizer, Recipe(method="wanda", sparsity=0.5), CORPUS, EN)
    record = plain.record.model_copy(update={"recipe": recipe(recover)})
    text = CalibrationText.draw(tokenizer, CORPUS, [EN])
    variant = Variant(record, plain.masks, plain.values)
    with pytest.raises(OSError, match="full"), recovering.recovering(DenseModel(model), variant, text):
        raise OSError("full")
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
