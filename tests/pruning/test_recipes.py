from __future__ import annotations

from hashlib import sha256

import pytest
from pydantic import ValidationError

from pruning import Anatomy, CalibrationSet, Recipe
from pruning.engine import check_fits
from pruning.errors import MethodError, RecipeError
from pruning.methods import Method, known_methods, magnitude, register
from pruning.quantization import Grid

DIAGNOSED = {"allocation": "diagnosis", "importance": {"0.q": 0.01, "0.down": 0.12}}


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, 50, float("nan")])
def test_sparsity_outside_zero_and_one_is_refused(sparsity):
    with pytest.raises(ValidationError, match="not between 0 and 1"):
        Recipe(method="wanda", sparsity=sparsity)


def test_unknown_method_is_refused_with_a_suggestion():
    with pytest.raises(ValidationError, match='unknown method "wnada"; did you mean "wanda"'):
        Recipe(method="wnada", sparsity=0.5)


def test_the_native_pattern_is_the_default():
    assert Recipe(method="wanda", sparsity=0.5).pattern == "row"
    assert Recipe(method="magnitude", sparsity=0.5).pattern == "matrix"
    assert Recipe(method="magnitude", sparsity=0.5, pattern="row").pattern == "row"


def test_native_choices_follow_the_method_and_the_pattern():
    assert Recipe(method="sparsegpt", sparsity=0.5).pattern == "matrix"
    assert Recipe(method="snip", sparsity=0.5).pattern == "model"
    assert Recipe(method="snip", sparsity=0.5).propagation == "dense"
    assert Recipe(method="gblm", sparsity=0.5).propagation == "pruned"
    assert Recipe(method="gblm", sparsity=0.5, propagation="dense").propagation == "dense"
    assert Recipe(method="wanda", sparsity=0.5).allocation == "uniform"
    assert Recipe(method="m-wanda", sparsity=0.5).allocation == "cross-lingual"
    assert Recipe(method="m-wanda", pattern="2:4").allocation == "uniform"
    assert Recipe(method="m-wanda", sparsity=0.5, allocation="uniform").allocation == "uniform"


def test_n_of_m_settles_the_sparsity():
    assert Recipe(method="wanda", pattern="2:4").sparsity == 0.5
    assert Recipe(method="wanda", pattern="1:4", sparsity=0.25).sparsity == 0.25
    with pytest.raises(ValidationError, match="omit sparsity"):
        Recipe(method="wanda", pattern="2:4", sparsity=0.6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"pattern": "5:4"}, "n out of every m"),
        ({"pattern": "rows"}, 'did you mean "row"'),
        ({"allocation": "owls"}, 'did you mean "owl"'),
        ({"allocation": "owl", "pattern": "2:4"}, 'needs pattern "row" or "matrix"'),
        ({"allocation": "owl", "pattern": "model"}, 'needs pattern "row" or "matrix"'),
        ({"roles": ["query"]}, 'unknown role "query"'),
        ({"blocks": "first"}, 'invalid blocks "first"; write "0:4"'),
        ({"blocks": ":"}, 'invalid blocks ":"; write "0:4"'),
        ({"parameters": {"power": 2}}, "has no parameter"),
        ({"method": "ria", "parameters": {"power": -1}}, "is not between 0 and 4"),
        ({"method": "ria", "parameters": {"power": float("nan")}}, "is not between 0 and 4"),
        ({"method": "ria", "parameters": {"pwr": 1}}, 'did you mean "power"'),
        ({"correction": "adm"}, 'unknown correction "adm"; did you mean "admm"'),
        ({"recover": "loras"}, 'unknown recover "loras"; did you mean "lora"'),
        (
            {"method": "gptq", "sparsity": None, "bits": 4, "recover": "lora"},
            "leave refinement, correction and recover",
        ),
        ({"parameters": {"steps": 5}}, 'has no parameter "steps"'),
        (
            {"recover": "fine-tune", "parameters": {"rank": 5}},
            '"wanda"."fine-tune" with uniform .* no parameter "rank"',
        ),
        ({"recover": "lora", "parameters": {"steps": 0}}, "steps = 0 is not between 1 and"),
        ({"recover": "lora", "parameters": {"batch": 1.5}}, "batch = 1.5 is not a whole number"),
        ({"refinement": "admm"}, 'unknown refinement "admm"; .*none, swaps'),
        ({"method": "sparsegpt", "refinement": "swaps"}, "leave refinement out, or refine the mask of another method"),
        ({"pattern": "neurons", "correction": "admm"}, "leave out refinement and correction"),
        ({"parameters": {"rounds": 5}}, 'has no parameter "rounds"'),
        ({"correction": "admm", "parameters": {"swaps": 5}}, '"wanda"."admm" with uniform .* no parameter "swaps"'),
        ({"correction": "admm", "parameters": {"rounds": 0}}, "rounds = 0 is not between 1 and 10000"),
        ({"refinement": "swaps", "parameters": {"swaps": 1.5}}, "swaps = 1.5 is not a whole number"),
        ({"allocation": "diagnosis"}, r'allocation "diagnosis" needs importance, the file .* writes \(remedy.json\)'),
        ({"importance": {"0.q": 1}}, 'needs allocation "diagnosis", not "uniform"'),
        ({"importance": {"0.q": 1}, "allocation": "owl"}, 'needs allocation "diagnosis", not "owl"'),
        (DIAGNOSED | {"pattern": "2:4"}, 'needs pattern "row" or "matrix"'),
        (DIAGNOSED | {"pattern": "model"}, 'needs pattern "row" or "matrix"'),
        (DIAGNOSED | {"importance": {"0.q": float("nan")}}, 'importance of "0.q" is nan'),
        (DIAGNOSED | {"importance": [("0.q", 1), ("0.q", 2)]}, "a matrix occurs twice in importance"),
        (DIAGNOSED | {"parameters": {"shuffle": 1.5}}, "shuffle = 1.5 is not a whole number"),
        (DIAGNOSED | {"parameters": {"shuffle": 1e7}}, "is not between 0 and 999999"),
        (DIAGNOSED | {"parameters": {"outlier": 5}}, 'no parameter "outlier"; .*shuffle, specific, spread'),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, words):
    with pytest.raises(ValidationError, match=words):
        Recipe(**({"method": "wanda", "sparsity": 0.5} | wrong))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "gptq"}, '"gptq" needs bits; write bits = 2, 3, 4 or 8'),
        ({"method": "gptq", "bits": 5}, "bits = 5 is not possible; write bits = 2, 3, 4 or 8"),
        ({"method": "rtn", "bits": 4, "group": 12}, r"group = 12 is not a multiple of 8; .* \(0: the whole row\)"),
        ({"method": "rtn", "bits": 4, "group": -8}, "group = -8 is not a multiple of 8"),
        ({"method": "awq", "bits": 4, "sparsity": 0.5}, '"awq" quantizes: write bits = 4 instead of sparsity = 0.5'),
        ({"method": "awq", "bits": 4, "pattern": "row"}, "leave pattern and allocation out"),
        ({"method": "awq", "bits": 4, "allocation": "owl"}, "leave pattern and allocation out"),
        ({"method": "rtn", "bits": 4, "parameters": {"order": 1}}, 'no parameter "order"; known: symmetric'),
        ({"method": "wanda", "sparsity": 0.5, "bits": 4}, "pruning and quantizing in one recipe is not possible yet"),
    ],
)
def test_bits_and_groups_that_do_not_exist_or_go_together_are_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        Recipe(**given)


def test_recipes_that_quantize_have_a_grid_instead_of_a_sparsity():
    recipe = Recipe(method="gptq", bits=4)
    assert (recipe.sparsity, recipe.group, recipe.quantizes, recipe.calibrated) == (0.0, 128, True, True)
    assert recipe.grid == Grid(4, 128)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    plain = Recipe(method="rtn", bits=3, group=0, parameters={"symmetric": 1})
    assert plain.grid == Grid(3, 0, symmetric=True)
    assert not plain.calibrated
    assert plain.variant_id(None) == "rtn-3bit-row-symmetric=1"
    assert plain.method_label == "rtn(symmetric=1)"


def test_groups_that_do_not_divide_the_inputs_are_refused(make_model):
    anatomy = Anatomy(make_model())
    with pytest.raises(
        RecipeError, match=r"group = 64 does not divide the 32 inputs of block 0, role q; write group = 32"
    ):
        check_fits(anatomy, Recipe(method="rtn", bits=4, group=64))
    check_fits(anatomy, Recipe(method="rtn", bits=4, group=32, roles=("q", "o")))


def test_scope():
    recipe = Recipe(method="wanda", sparsity=0.5, roles=("o", "gate"), blocks="0:2, 5,7:")
    assert [layer for layer in range(9) if recipe.covers(layer, "o")] == [0, 1, 5, 7, 8]
    assert recipe.covers(0, "gate.3")
    assert not recipe.covers(0, "up")
    assert recipe.scope == "o gate, blocks 0:2,5,7:"
    assert Recipe(method="wanda", sparsity=0.5).scope == "all"


def test_parameters_that_are_the_default_make_no_other_recipe():
    plain = Recipe(method="ria", sparsity=0.5)
    assert Recipe(method="ria", sparsity=0.5, parameters={"power": 0.5}) == plain
    other = Recipe(method="ria", sparsity=0.5, allocation="owl", parameters={"spread": 0.1, "power": 1})
    assert other.method_label == "ria(power=1)"
    assert other.allocation_label == "owl(spread=0.1)"
    assert other.variant_id(None) == "ria-0.5-matrix-owl-power=1-spread=0.1"
    assert Recipe.model_validate_json(other.model_dump_json()) == other


def test_what_follows_a_mask_is_part_of_the_name_and_needs_text():
    plain = Recipe(method="magnitude", sparsity=0.5)
    assert Recipe(method="magnitude", sparsity=0.5, correction="none", refinement="none") == plain
    assert not plain.calibrated
    recipe = Recipe(
        method="ria", sparsity=0.5, refinement="swaps", correction="admm", parameters={"power": 1, "rounds": 5}
    )
    assert recipe.method_label == "ria(power=1)+swaps+admm(rounds=5)"
    assert recipe.variant_id(CalibrationSet.named("sw")) == "ria+swaps+admm-0.5-matrix-power=1-rounds=5-pruned-sw-s0"
    assert recipe.needs == {"squares", "gram"}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    for more in ({"refinement": "swaps"}, {"correction": "least-squares"}):
        followed = Recipe(method="magnitude", sparsity=0.5, **more)
        assert followed.calibrated
        assert followed.updates == ("correction" in more)
    assert Recipe(method="sparsegpt", sparsity=0.5, correction="admm").method_label == "sparsegpt+admm"


def test_fine_tuning_is_part_of_the_name_and_needs_text_and_the_whole_model():
    plain = Recipe(method="magnitude", sparsity=0.5)
    assert Recipe(method="magnitude", sparsity=0.5, recover="none") == plain
    assert not plain.whole
    settings = {"steps": 200, "rate": 0.002, "rounds": 5}
    recipe = Recipe(method="magnitude", sparsity=0.5, correction="admm", recover="lora", parameters=settings)
    assert recipe.method_label == "magnitude+admm(rounds=5)+lora(rate=0.002)"
    assert (
        recipe.variant_id(CalibrationSet.named("sw"))
        == "magnitude+admm+lora-0.5-matrix-rate=0.002-rounds=5-pruned-sw-s0"
    )
    assert recipe.recovery_parameters == {"steps": 200, "batch": 8, "decay": 0, "rate": 0.002, "rank": 8, "alpha": 16}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    tuned = Recipe(method="magnitude", sparsity=0.5, recover="fine-tune")
    assert tuned.calibrated
    assert not tuned.needs
    assert tuned.whole == 'recover = "fine-tune" trains on the loss'


def test_a_diagnosis_is_part_of_the_name_and_reads_back():
    recipe = Recipe(method="wanda", sparsity=0.5, **DIAGNOSED)
    assert recipe.importance == (("0.down", 0.12), ("0.q", 0.01))
    assert recipe == Recipe(method="wanda", sparsity=0.5, allocation="diagnosis", importance=recipe.importance[::-1])
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    digits = sha256(b'{"0.down":0.12,"0.q":0.01}').hexdigest()[:6]
    assert recipe.allocation_label == f"diagnosis={digits}"
    assert recipe.variant_id(CalibrationSet.named("sw")) == f"wanda-0.5-row-diagnosis={digits}-pruned-sw-s0"
    control = Recipe(method="wanda", sparsity=0.5, **DIAGNOSED, parameters={"shuffle": 1})
    assert control.allocation_label == f"diagnosis={digits}(shuffle=1)"
    assert control.variant_id(None) == f"wanda-0.5-row-diagnosis={digits}-shuffle=1"
    other = Recipe(method="wanda", sparsity=0.5, **DIAGNOSED | {"importance": {"0.q": 0.02, "0.down": 0.12}})
    assert other.variant_id(None) != recipe.variant_id(None)


def test_a_diagnosis_needs_no_text_of_its_own():
    assert not Recipe(method="magnitude", sparsity=0.5, **DIAGNOSED).calibrated
    assert Recipe(method="wanda", sparsity=0.5, **DIAGNOSED).calibrated
    assert Recipe(method="magnitude", sparsity=0.5, allocation="owl").calibrated


def test_ids_are_folder_names_and_tell_recipes_apart():
    recipes = [
        Recipe(method="wanda", pattern="2:4"),
        Recipe(method="wanda", sparsity=0.5),
        Recipe(method="wanda", sparsity=0.5, roles=("o",)),
        Recipe(method="wanda", sparsity=0.5, blocks="0:2"),
        Recipe(method="wanda", sparsity=0.5, blocks="0,2"),
        Recipe(method="wanda", sparsity=0.5, allocation="owl"),
        Recipe(method="wanda", sparsity=0.5, **DIAGNOSED),
        Recipe(method="wanda", sparsity=0.5, **DIAGNOSED, parameters={"shuffle": 1}),
        Recipe(method="wanda", sparsity=0.5, propagation="dense"),
    ]
    ids = [recipe.variant_id(CalibrationSet.named("en")) for recipe in recipes]
    assert len(set(ids)) == len(ids)
    assert not any(set(name) & set(':/\\*?"<>|') for name in ids)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"parameters": {"seed": 1_000_001}}, {"parameters": {"seed": 1_000_002}}),
        ({"parameters": {"seed": 2**31 - 1}}, {"parameters": {"seed": 2**31 - 2}}),
        ({}, {"sparsity": 0.5 + 1e-12}),
        ({"sparsity": 0.123456}, {"sparsity": 0.1234564}),
    ],
)
def test_numbers_in_ids_are_exact(one, other):
    recipes = [Recipe(**{"method": "random", "sparsity": 0.5} | given) for given in (one, other)]
    names = [recipe.variant_id(None) for recipe in recipes]
    assert names[0] != names[1]
    assert [recipe.method_label for recipe in recipes] != [recipes[0].method_label] * 2 or one.keys() != {"parameters"}


def test_ids_that_were_exact_stay_as_they_were():
    assert Recipe(method="wanda", sparsity=0.5).variant_id(CalibrationSet.named("sw")) == "wanda-0.5-row-pruned-sw-s0"
    seeded = Recipe(method="random", sparsity=0.29, parameters={"seed": 1_000_000})
    assert seeded.variant_id(None) == "random-0.29-matrix-seed=1e+06"
    assert seeded.method_label == "random(seed=1e+06)"
    third = Recipe(method="wanda", pattern="1:3")
    assert third.variant_id(None) == "wanda-0.333333-1of3"
    assert Recipe(method="wanda", pattern="1:3", sparsity=0.3333333333) == third


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("random", {"seed": 0.5}, "seed = 0.5 is not a whole number"),
        ("random", {"seed": 1_000_000.25}, r"seed = 1000000\.25 is not a whole number"),
        ("sparsegpt", {"columns": 64.5}, r"columns = 64\.5 is not a whole number"),
        ("random", (("seed", 1), ("seed", 2)), "a name occurs twice in parameters"),
    ],
)
def test_parameters_that_count_are_whole_numbers(method, parameters, words):
    with pytest.raises(ValidationError, match=words):
        Recipe(method=method, sparsity=0.5, parameters=parameters)


@pytest.mark.parametrize("name", ["../en", "a/b", "", ".", "..", "a b", "a\\b", "a\n", "C:", "x" * 101, "a\0"])
def test_names_of_calibration_sets_are_parts_of_file_names(name):
    with pytest.raises(ValidationError, match="becomes part of file names") as caught:
        CalibrationSet(name=name, languages=("en",))
    assert all(len(line) < 500 for line in str(caught.value).splitlines())


@pytest.mark.parametrize("name", ["all", "en+sw", "zh-Hant", "news_2024.v2=b", "日本語"])
def test_ordinary_names_of_calibration_sets_stay(name):
    assert CalibrationSet(name=name, languages=("en",)).name == name


def test_a_method_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="already registered"):
        register(Method("magnitude", magnitude.score, source=""))


def test_a_method_that_needs_an_unknown_statistic_is_refused():
    wrong = Method("mine", magnitude.score, source="", needs=frozenset({"square"}))
    with pytest.raises(MethodError, match=r'^method "mine": unknown statistic "square"; did you mean "squares"'):
        register(wrong)
    assert "mine" not in known_methods()


def test_mixes_share_a_constant_total():
    for name in ("en", "en+sw", "ar+en+sw"):
        assert sum(CalibrationSet.named(name, samples=7, length=8).shares().values()) == 7


def test_more_languages_than_samples_is_refused():
    with pytest.raises(ValidationError, match="every language needs at least one sample"):
        CalibrationSet.named("ar+en+sw", samples=2, length=8)


def test_unknown_language_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match='unknown language tag "swahili"; did you mean "sw"'):
        CalibrationSet.named("en+swahili")
