from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from pairwise import pairwise

from pruning import Anatomy, CalibrationSet, Recipe, known_methods
from pruning.correction import admm, swaps
from pruning.engine import Job, Schedule, Workspace, sweep
from pruning.engine.sweep import sweep_work
from pruning.errors import ModelError, RecipeError
from pruning.methods import Method, columns, method_named, registry
from pruning.parameters import Parameter
from pruning.spectrum import squared_singular_values
from pruning.statistics import SQUARES, InputStatistics
from pruning.text.calibration import CalibrationText, Piece

EN = CalibrationSet(name="en", languages=("en",), samples=4, length=16)
MIX = CalibrationSet(name="en+sw", languages=("en", "sw"), samples=4, length=16)


def text() -> CalibrationText:
    """The English text of the mix is the first half of that of `EN`."""
    ids = torch.randint(3, 250, (6, 16), generator=torch.Generator().manual_seed(7))
    en, more, sw = Piece("en", 16, 0, 2), Piece("en", 16, 2, 4), Piece("sw", 16, 0, 2)
    tokens = {en: ids[:2], more: ids[2:4], sw: ids[4:]}
    return CalibrationText(tokens, {EN: [en, more], MIX: [en, sw]})


def jobs(*recipes: Recipe) -> list[Job]:
    return [Job(r, s) for r in recipes for s in ((EN, MIX) if r.calibrated else (None,))]


GRID = [
    Recipe(method="wanda", sparsity=0.3),
    Recipe(method="wanda", sparsity=0.5, pattern="2:4"),
    Recipe(method="wanda", sparsity=0.5, propagation="dense"),
    Recipe(method="wanda", sparsity=0.5, roles=("o", "down"), blocks="1:"),
    Recipe(method="wanda", sparsity=0.5, blocks="0,2"),
    Recipe(method="wanda", sparsity=0.5, allocation="owl"),
    Recipe(method="sparsegpt", sparsity=0.5),
    Recipe(method="sparsegpt", sparsity=0.5, pattern="model"),
    Recipe(method="sparsegpt", sparsity=0.5, propagation="dense"),
    Recipe(method="wanda", sparsity=0.5, refinement="swaps", correction="admm"),
    Recipe(method="sparsegpt", sparsity=0.5, correction="least-squares", blocks="1:"),
    Recipe(method="snip", sparsity=0.5, refinement="swaps", correction="admm"),
    Recipe(method="magnitude", sparsity=0.5, pattern="2:4", refinement="swaps"),
    Recipe(method="ria", sparsity=0.5, parameters={"power": 1.0}),
    Recipe(method="m-wanda", sparsity=0.5),
    Recipe(method="magnitude", sparsity=0.5),
    Recipe(method="magnitude", sparsity=0.5, allocation="owl"),
    Recipe(method="wanda", sparsity=0.5, allocation="alpha"),
    Recipe(method="magnitude", sparsity=0.5, allocation="alpha"),
    Recipe(method="snip", sparsity=0.5),
    Recipe(method="grasp", sparsity=0.5, pattern="row"),
    Recipe(method="random", sparsity=0.5),
    Recipe(method="gblm", sparsity=0.5),
    Recipe(method="gblm", sparsity=0.5, pattern="model", propagation="dense"),
    Recipe(method="gblm", sparsity=0.3, allocation="owl"),
]
OWL = Recipe(method="wanda", sparsity=0.5, allocation="owl")


def overflowing(weight, statistics, *, limit=1.0):
    """Return scores that are not finite in matrices with more inputs than `limit`."""
    return weight.float().abs() * statistics.known_inputs.norms / float(weight.shape[1] <= limit or "nan")


@pytest.fixture
def overflowing_method(monkeypatch):
    """A method that fails in some matrices, for the tests of this file only."""
    method = Method(
        "overflowing",
        overflowing,
        source="this test",
        needs=frozenset({SQUARES}),
        parameters={"limit": Parameter(1, 1, 1e6, "inputs")},
    )
    monkeypatch.setitem(registry._METHODS, method.name, method)


#: Methods that look at the weights alone.
TEXTLESS = ("magnitude", "random")


def equal(one: Any, other: Any) -> bool:
    values = one.values, other.values
    return (
        one.masks == other.masks
        and values[0].keys() == values[1].keys()
        and all(torch.equal(value, values[1][key]) for key, value in values[0].items())
        and one.remarks == other.remarks
    )


@pytest.mark.parametrize("kind", ["llama", "bloom", "mixtral", "mt5"])
def test_a_grid_in_lockstep_equals_its_jobs_one_by_one(kind):
    anatomy = Anatomy(tiny_model(kind))
    wanted = jobs(*GRID)
    together = sweep(anatomy, wanted, text())
    for job in wanted:
        assert equal(together(job), sweep(anatomy, [job], text())(job)), job.id


def test_statistics_of_pieces_add_up_to_those_of_the_whole_text(model):
    """The mix shares its English text with the English set; alone, it is drawn as one piece each."""
    recipe = Recipe(method="wanda", sparsity=0.5, propagation="dense")
    shared = sweep(Anatomy(model), jobs(recipe), text())
    ids = torch.cat([tokens for piece, tokens in text().tokens.items() if piece in text().pieces[EN]])
    whole = Piece("en", 16, 0, 4)
    alone = sweep(Anatomy(model), [Job(recipe, EN)], CalibrationText({whole: ids}, {EN: [whole]}))
    assert shared(Job(recipe, EN)).masks == alone(Job(recipe, EN)).masks


def test_propagation_makes_a_difference_from_the_second_block_on(model):
    one, other = (Job(Recipe(method="wanda", sparsity=0.5, propagation=p), EN) for p in ("pruned", "dense"))
    result = sweep(Anatomy(model), [one, other], text())
    pruned, dense = result(one).masks, result(other).masks
    assert all(torch.equal(pruned[key], dense[key]) for key in pruned if key[0] == 0)
    assert pruned != dense


def test_a_recipe_keeps_to_its_scope_and_its_sparsity_there():
    anatomy = Anatomy(tiny_model())
    recipe = Recipe(method="wanda", sparsity=0.5, roles=("o", "q"), blocks="1:")
    masks = sweep(anatomy, [Job(recipe, EN)], text())(Job(recipe, EN)).masks
    assert set(masks) == {(1, "q"), (1, "o"), (2, "q"), (2, "o")}
    assert masks.sparsity() == 0.5
    gpt2 = Recipe(method="magnitude", sparsity=0.5, roles=("gate",))
    with pytest.raises(RecipeError, match='no projection "gate"; it has q k v o up down'):
        sweep(Anatomy(tiny_model("gpt2")), [Job(gpt2)])
    with pytest.raises(RecipeError, match=r"do not exist; this model has blocks 0 to 2"):
        sweep(anatomy, [Job(Recipe(method="magnitude", sparsity=0.5, blocks="3:"))])


@pairwise(
    {"sparsity": [0.1, 0.37, 0.5, 0.99], "allocation": ["owl", "cross-lingual", "alpha"], "pattern": ["row", "matrix"]}
)
def test_allocations_remove_exactly_as_much_as_uniform_does(allocation, pattern, sparsity):
    anatomy = Anatomy(tiny_model("mixtral"))
    spread = {"spread": 0.005}
    recipes = [
        Recipe(method="wanda", sparsity=sparsity, pattern=pattern, allocation=allocation, parameters=spread),
        Recipe(method="wanda", sparsity=sparsity, pattern=pattern),
    ]
    pruned = sweep(anatomy, [Job(recipe, MIX) for recipe in recipes], text())
    shifted, even = (pruned(Job(recipe, MIX)).masks for recipe in recipes)
    assert shifted.kept() == even.kept()
    assert {key: shifted.kept(key) for key in shifted} != {key: even.kept(key) for key in even}


ALPHA = [
    Recipe(method="magnitude", sparsity=0.5, allocation="alpha"),
    Recipe(method="wanda", sparsity=0.5, allocation="alpha", parameters={"spread": 0.2}),
]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_alpha_equals_a_naive_version_whatever_the_text_and_the_method(kind):
    anatomy = Anatomy(tiny_model(kind))
    wanted = jobs(*ALPHA)
    result = sweep(anatomy, wanted, text())
    matrices = [[anatomy.weight(layer, role) for role in anatomy.roles(layer)] for layer in range(len(anatomy.blocks))]
    for job in wanted:
        masks, spread = result(job).masks, job.recipe.allocation_parameters["spread"]
        expected = naive.alpha_block_sparsities(matrices, 0.5, spread)
        for key in masks:
            size = masks[key].numel()
            assert size - masks.kept(key) == pytest.approx(expected[key[0]] * size, abs=1), key
        assert masks.sparsity() == 0.5


def test_spectra_are_computed_once_and_only_of_matrices_in_scope(monkeypatch):
    seen: list[tuple[int, ...]] = []

    def spectrum(weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight.shape)
        return squared_singular_values(weight)

    monkeypatch.setattr("pruning.engine.budgets.squared_singular_values", spectrum)
    anatomy = Anatomy(tiny_model())
    exponents: dict[tuple[int, str], float] = {}
    scoped = Recipe(method="magnitude", sparsity=0.5, allocation="alpha", roles=("o",))
    sweep(anatomy, [Job(scoped)], exponents=exponents)
    assert seen == [anatomy.shape(layer, "o") for layer in range(3)]
    sweep(anatomy, jobs(*ALPHA), text(), exponents=exponents)
    assert len(seen) == len(exponents) == len(list(anatomy))


def test_alpha_takes_no_text():
    anatomy = Anatomy(tiny_model())
    even = Recipe(method="wanda", sparsity=0.5)
    assert not ALPHA[0].calibrated
    assert sweep_work(anatomy, jobs(ALPHA[1]), text()) == sweep_work(anatomy, jobs(even), text())


def test_a_weight_that_is_not_finite_sets_the_jobs_aside_that_look_at_it():
    anatomy = Anatomy(tiny_model())
    anatomy.weight(1, "up").data[0, 0] = float("nan")
    wanted = [ALPHA[0], Recipe(method="magnitude", sparsity=0.5, allocation="alpha", roles=("q", "o"))]
    result = sweep(anatomy, [Job(recipe) for recipe in wanted])
    assert [job.recipe for job in result.set_aside] == wanted[:1]
    assert "block 1, role up: a weight or an activation is NaN or infinite" in result.set_aside[Job(wanted[0])]


def importances(anatomy: Anatomy) -> dict[str, float]:
    """Heavy-tailed as attributed effects are, with ties and some that are negative; in no order of place."""
    return {f"{layer}.{role}": round(10 ** (n * 7 % 13 - 9), 3) - 0.01 for n, (layer, role) in enumerate(anatomy)}


@pytest.mark.parametrize("pattern", ["row", "matrix"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "mt5"])
def test_a_diagnosis_shifts_what_every_method_removes_and_not_how_much(kind, pattern):
    anatomy = Anatomy(tiny_model(kind))
    importance = importances(anatomy)
    sizes = {key: anatomy.shape(*key)[0] * anatomy.shape(*key)[1] for key in anatomy}
    expected = naive.diagnosis_sparsities({key: importance[f"{key[0]}.{key[1]}"] for key in anatomy}, sizes, 0.5)
    wanted = [
        Job(Recipe(method=method, sparsity=0.5, pattern=pattern, **allocation), None if method in TEXTLESS else MIX)
        for method in known_methods()
        if method_named(method).scores == "weights" and not method_named(method).quantize
        for allocation in (
            {"allocation": "uniform"},
            {"allocation": "diagnosis", "importance": importance},
            {"allocation": "diagnosis", "importance": importance, "parameters": {"shuffle": 2}},
        )
    ]
    result = sweep(anatomy, wanted, text())
    for even, spared, control in zip(wanted[::3], wanted[1::3], wanted[2::3], strict=True):
        masks = result(spared).masks
        assert masks.kept() == result(even).masks.kept() == result(control).masks.kept()
        assert masks != result(control).masks
        for key in anatomy:
            assert sizes[key] - masks.kept(key) == pytest.approx(expected[key] * sizes[key], abs=1), spared.id
        shares = [sorted(m.sparsity(key) for key in m if key[1] == "up") for m in (masks, result(control).masks)]
        assert shares[0] == pytest.approx(shares[1], abs=1 / 500)  # the same shape in other places
        assert equal(result(spared), sweep(anatomy, [spared], text())(spared)), spared.id


def test_a_diagnosis_takes_no_look_at_the_dense_model(model):
    anatomy = Anatomy(model)
    even = Recipe(method="wanda", sparsity=0.5)
    spared = Recipe(method="wanda", sparsity=0.5, allocation="diagnosis", importance=importances(anatomy))
    assert sweep_work(anatomy, jobs(spared), text()) == sweep_work(anatomy, jobs(even), text())
    assert sweep_work(anatomy, jobs(spared), text()) < sweep_work(anatomy, jobs(OWL), text())


def test_a_diagnosis_may_say_more_than_the_scope_and_never_less():
    anatomy = Anatomy(tiny_model())
    given: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5, "allocation": "diagnosis"}
    whole = importances(anatomy)
    scoped = Job(Recipe(**given, importance=whole, roles=("o", "q"), blocks="1:"))
    masks = sweep(anatomy, [scoped])(scoped).masks
    assert set(masks) == {(1, "q"), (1, "o"), (2, "q"), (2, "o")}
    assert masks.sparsity() == 0.5
    assert len({masks.sparsity(key) for key in masks}) > 1
    lacking = {name: value for name, value in whole.items() if name not in ("1.down", "2.q")}
    with pytest.raises(RecipeError, match=r'importance lacks "1\.down" and 1 more in the recipe'):
        sweep(anatomy, [Job(Recipe(**given, importance=lacking))])
    with pytest.raises(RecipeError, match=r'names "3\.q", but this llama model has no such matrix'):
        sweep(anatomy, [Job(Recipe(**given, importance=whole | {"3.q": 0.1}))])
    with pytest.raises(RecipeError, match="lower the spread"):
        sweep(anatomy, [Job(Recipe(**given | {"sparsity": 0.97}, importance=whole))])


def test_n_of_m_needs_inputs_in_groups_of_m():
    anatomy = Anatomy(tiny_model("llama", intermediate_size=50))
    with pytest.raises(RecipeError, match="role down has 50"):
        sweep(anatomy, [Job(Recipe(method="magnitude", sparsity=0.5, pattern="2:4"))])
    scoped = Job(Recipe(method="magnitude", sparsity=0.5, pattern="2:4", roles=("q", "o")))
    assert sweep(anatomy, [scoped])(scoped).masks.sparsity() == 0.5


def test_row_sparsity_is_exact_when_scores_tie(model):
    anatomy = Anatomy(model)
    for key in anatomy:
        anatomy.weight(*key).fill_(0.01)
    job = Job(Recipe(method="wanda", sparsity=0.5), EN)
    masks = sweep(anatomy, [job], text())(job).masks
    assert all(bool((masks[key].sum(dim=1) * 2 == masks[key].shape[1]).all()) for key in masks)


def test_the_model_is_unchanged_afterwards_bit_for_bit(make_model, architecture):
    model = make_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sweep(Anatomy(model), jobs(*GRID[:2], *GRID[5:7], *GRID[-3:-1]), text())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_unchanged_when_the_sweep_fails(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(Anatomy(model), jobs(*GRID), text(), progress=fail)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_roles_are_ever_pruned(make_model, architecture):
    anatomy = Anatomy(make_model(architecture))
    job = Job(Recipe(method="magnitude", sparsity=0.5))
    assert set(sweep(anatomy, [job])(job).masks) == set(anatomy)


def test_batch_size_does_not_change_the_masks(model):
    job = Job(Recipe(method="wanda", sparsity=0.5), EN)
    small, large = (sweep(Anatomy(model), [job], text(), batch_tokens=n)(job).masks for n in (16, 1000))
    assert small == large


@pytest.mark.parametrize("recipe", GRID, ids=lambda recipe: recipe.variant_id(None))
def test_work_foretold_is_work_done(model, recipe):
    done: list[int] = []
    anatomy = Anatomy(model)
    sweep(anatomy, jobs(recipe), text(), progress=done.append)
    assert sum(done) == sweep_work(anatomy, jobs(recipe), text())


def test_shared_text_goes_through_the_model_once(model):
    """Under dense propagation any number of jobs costs one pass; under pruned propagation the first block is shared."""
    anatomy = Anatomy(model)
    size = 6 * 16
    dense = jobs(
        *(Recipe(method=m, sparsity=s, propagation="dense") for m in ("wanda", "sparsegpt") for s in (0.3, 0.5))
    )
    assert sweep_work(anatomy, dense, text()) == 3 * size
    pruned = jobs(Recipe(method="wanda", sparsity=0.5), Recipe(method="sparsegpt", sparsity=0.5))
    own = 4 * (4 * 16)  # four jobs of four samples
    assert [Schedule(anatomy, pruned, text()).tokens(layer) for layer in range(3)] == [size + own, 2 * own, own]


def test_a_grid_shares_one_gram_matrix_and_one_inverse_a_set_and_input(model, monkeypatch):
    """Masks of three methods, refined, corrected, and SparseGPT: as many as for one recipe, on each of two sets."""
    made: list[str] = []
    for place, name in ((columns, "Factor"), (admm, "_inverted"), (swaps, "_Inputs")):
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, o=original, n=name: made.append(n) or o(*args))
    add = InputStatistics.add
    monkeypatch.setattr(InputStatistics, "add", lambda *args: made.append("add") or add(*args))
    dense = {"sparsity": 0.5, "propagation": "dense"}
    grid = [
        Recipe(method=method, refinement=refinement, correction="admm", **dense)
        for method in ("wanda", "magnitude", "random")
        for refinement in ("none", "swaps")
    ]
    grid += [Recipe(method="sparsegpt", **dense), Recipe(method="sparsegpt", correction="admm", **dense)]
    sweep(Anatomy(model), jobs(grid[1]), text())
    alone = made.count("add")
    made.clear()
    anatomy = Anatomy(model)
    sweep(anatomy, jobs(*grid), text())
    groups = sum(len(anatomy.groups(layer)) for layer in range(3))
    assert made.count("add") == alone
    assert [made.count(name) for name in ("Factor", "_inverted", "_Inputs")] == 3 * [2 * groups]


def test_a_workspace_in_a_folder_gives_the_same(model, tmp_path):
    wanted = jobs(*GRID)
    in_memory = sweep(Anatomy(model), wanted, text())
    for states in ("device", "host", "disk"):
        workspace = Workspace(tmp_path / "work", "key", states=states)
        on_disk = sweep(Anatomy(model), wanted, text(), workspace=workspace)
        assert all(equal(in_memory(job), on_disk(job)) for job in wanted)
        workspace.close()


def test_a_method_that_needs_text_says_so(model):
    with pytest.raises(RecipeError, match="wanda needs calibration text"):
        sweep(Anatomy(model), [Job(Recipe(method="wanda", sparsity=0.5))])
    with pytest.raises(RecipeError, match=r"magnitude\+admm needs calibration text"):
        sweep(Anatomy(model), [Job(Recipe(method="magnitude", sparsity=0.5, correction="admm"))])


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "snip"])
def test_nan_weights_are_refused_with_their_place(model, method):
    Anatomy(model).weight(1, "up")[3, 4] = torch.nan
    wanted = jobs(Recipe(method=method, sparsity=0.5))
    result = sweep(Anatomy(model), wanted, text())
    assert result.set_aside.keys() == set(wanted)
    with pytest.raises(ModelError, match=r"block 1, role (up|gate)|loss on the calibration text is not finite"):
        result(wanted[0])


@pytest.mark.parametrize("states", ["device", "disk"])
@pytest.mark.parametrize("propagation", ["pruned", "dense"])
def test_a_job_that_fails_is_set_aside_and_the_others_finish(model, tmp_path, overflowing_method, states, propagation):
    anatomy = Anatomy(model)
    bad = [
        Job(Recipe(method="overflowing", sparsity=0.5, propagation=propagation, parameters={"limit": 40}), s)
        for s in (EN, MIX)
    ]
    spread = Recipe(method="wanda", sparsity=0.01, allocation="owl")
    good = jobs(
        Recipe(method="wanda", sparsity=0.5),
        Recipe(method="sparsegpt", sparsity=0.5),
        Recipe(method="magnitude", sparsity=0.3),
        Recipe(method="wanda", sparsity=0.4, propagation="dense"),
    )
    wanted = [bad[0], *good, Job(spread, EN), bad[1]]
    done: list[int] = []
    place = Workspace(tmp_path / "w", "key", states=states)
    result = sweep(anatomy, wanted, text(), workspace=place, progress=done.append)
    assert result.set_aside.keys() == {*bad, Job(spread, EN)}
    for job in bad:
        assert result.set_aside[job] == (
            "block 0, role down: a weight or an activation is NaN or infinite; "
            "check the checkpoint, or load it with dtype float32 or bfloat16"
        )
        assert not place.place(job.id).exists()
    assert "lower the spread" in result.set_aside[Job(spread, EN)]
    assert sum(done) == sweep_work(anatomy, wanted, text())  # so that the time left comes to an end
    alone = sweep(anatomy, good, text())
    assert all(equal(result(job), alone(job)) for job in good)
    again = sweep(anatomy, wanted, text(), workspace=Workspace(tmp_path / "w", "key", states=states))
    assert again.set_aside == result.set_aside


def test_a_survey_or_a_loss_that_fails_takes_only_its_own_jobs(model):
    anatomy = Anatomy(model)
    model.get_input_embeddings().weight.data[text().tokens[Piece("sw", 16, 0, 2)].flatten()[0]] = torch.inf
    wanted = jobs(
        Recipe(method="snip", sparsity=0.5),
        Recipe(method="gblm", sparsity=0.5),
        OWL,
        Recipe(method="wanda", sparsity=0.5, pattern="model"),
        Recipe(method="magnitude", sparsity=0.5, pattern="model"),
    )
    done: list[int] = []
    result = sweep(anatomy, wanted, text(), progress=done.append)
    assert {job for job in wanted if job.calibration == MIX} <= result.set_aside.keys()
    assert {job for job in wanted if job.calibration is None}.isdisjoint(result.set_aside)
    assert sum(done) == sweep_work(anatomy, wanted, text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_pruned_with_float32_statistics(dtype):
    anatomy = Anatomy(tiny_model().to(dtype))
    wanted = jobs(*GRID)
    pruned = sweep(anatomy, wanted, text())
    for job in wanted:
        result = pruned(job)
        assert all(value.dtype == dtype for value in result.values.values())
        shapes = [anatomy.shape(*key) for key in anatomy if job.recipe.covers(*key)]
        even = sum(job.recipe.choosing.uniform(shape, job.recipe.sparsity) for shape in shapes)
        assert sum(o * i for o, i in shapes) - result.masks.kept() == even


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_nearly_the_same_masks():
    on_cpu, on_gpu = Anatomy(tiny_model()), Anatomy(tiny_model().cuda())
    wanted = jobs(*GRID)
    cpu, gpu = sweep(on_cpu, wanted, text()), sweep(on_gpu, wanted, text())
    for job in wanted:
        iou = cpu(job).masks.iou(gpu(job).masks)
        assert min(iou.values()) > 0.98, job.id
