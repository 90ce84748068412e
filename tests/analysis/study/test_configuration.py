from __future__ import annotations

import re
import tomllib

import pytest

from analysis import demo_study, load_study
from analysis.study.study_file import parse_study
from analysis.study.without_file import looking_study
from pruning import Remedy
from pruning.errors import StudyError

MINIMAL = 'model = "demo"\nlanguages = ["en", "sw"]\n'


def load(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="utf-8")
    return load_study(path)


def test_model_and_languages_are_all_that_is_needed(tmp_path):
    study = load(tmp_path, MINIMAL)
    assert [recipe.method for recipe in study.all_recipes()] == ["wanda"]
    assert [s.name for s in study.calibration_sets()] == ["all"]


def test_resolved_study_writes_every_default_and_reads_back(tmp_path):
    study = load(tmp_path, MINIMAL)
    text = study.to_toml()
    assert "max_length = 256" in text
    assert parse_study(tomllib.loads(text), "again") == study


def test_lists_make_a_grid(tmp_path):
    study = load(tmp_path, MINIMAL + '[[recipes]]\nmethod = ["magnitude", "wanda"]\nsparsity = [0.3, 0.5]\n')
    assert [(r.method, r.sparsity) for r in study.all_recipes()] == [
        ("magnitude", 0.3),
        ("magnitude", 0.5),
        ("wanda", 0.3),
        ("wanda", 0.5),
    ]


def recipes(tmp_path, *lines):
    return load(tmp_path, MINIMAL + "[[recipes]]\n" + "\n".join(lines)).all_recipes()


def test_n_of_m_settles_the_sparsity(tmp_path):
    (recipe,) = recipes(tmp_path, 'method = "wanda"', 'pattern = "2:4"')
    assert (recipe.pattern, recipe.sparsity) == ("2:4", 0.5)
    (recipe,) = recipes(tmp_path, 'method = "wanda"', 'pattern = "1:4"', "sparsity = 0.25")
    assert recipe.sparsity == 0.25


def test_n_of_m_among_other_patterns_is_one_point_of_the_grid(tmp_path):
    found = recipes(tmp_path, 'method = "wanda"', 'pattern = ["row", "2:4", "1:4"]', "sparsity = [0.3, 0.6]")
    assert [(r.pattern, r.sparsity) for r in found] == [("row", 0.3), ("row", 0.6), ("2:4", 0.5), ("1:4", 0.25)]


def test_bits_and_groups_make_a_grid_and_need_no_sparsity(tmp_path):
    found = recipes(tmp_path, 'method = ["rtn", "gptq"]', "bits = [4, 3]", "group = [128, 0]")
    assert [(r.method, r.bits, r.group, r.sparsity) for r in found] == [
        (method, bits, group, 0.0) for method in ("rtn", "gptq") for bits in (4, 3) for group in (128, 0)
    ]
    (recipe,) = recipes(tmp_path, 'method = "awq"', "bits = 4")
    assert recipe.group == 128


def test_native_choices_are_those_of_each_method(tmp_path):
    found = recipes(tmp_path, 'method = ["magnitude", "wanda", "m-wanda", "sparsegpt", "snip"]')
    assert [(r.method, r.pattern, r.allocation, r.propagation) for r in found] == [
        ("magnitude", "matrix", "uniform", "pruned"),
        ("wanda", "row", "uniform", "pruned"),
        ("m-wanda", "row", "cross-lingual", "pruned"),
        ("sparsegpt", "matrix", "uniform", "pruned"),
        ("snip", "model", "uniform", "dense"),
    ]


def test_allocations_blocks_and_parameters_make_a_grid_and_roles_do_not(tmp_path):
    found = recipes(
        tmp_path,
        'method = "ria"',
        'allocation = ["uniform", "owl"]',
        'blocks = ["", ":4"]',
        'roles = ["down", "o"]',
        "parameters = { power = [0.5, 0.7, 1] }",
    )
    assert len(found) == 2 * 2 * 3
    assert {r.roles for r in found} == {("o", "down")}
    assert {(r.allocation, r.blocks) for r in found} == {(a, b) for a in ("uniform", "owl") for b in ("", ":4")}
    assert {r.method_label for r in found} == {"ria", "ria(power=0.7)", "ria(power=1)"}
    assert len({r.variant_id(None) for r in found}) == len(found)


def test_parameters_of_an_allocation_are_a_grid_too(tmp_path):
    found = recipes(
        tmp_path, 'method = "wanda"', 'allocation = "owl"', "parameters = { outlier = [3, 5], spread = 0.1 }"
    )
    assert [r.allocation_parameters for r in found] == [{"outlier": 3, "spread": 0.1}, {"outlier": 5, "spread": 0.1}]


def test_refinements_and_corrections_make_a_grid(tmp_path):
    found = recipes(
        tmp_path, 'method = ["wanda", "ria"]', 'refinement = ["none", "swaps"]', 'correction = ["none", "admm"]'
    )
    labels = ["wanda", "wanda+admm", "wanda+swaps", "wanda+swaps+admm"]
    assert [r.method_label for r in found] == labels + [label.replace("wanda", "ria") for label in labels]


def test_recipes_with_and_without_fine_tuning_make_a_grid(tmp_path):
    found = recipes(tmp_path, 'method = ["wanda", "ria"]', 'recover = ["none", "lora", "fine-tune"]')
    labels = ["wanda", "wanda+lora", "wanda+fine-tune"]
    assert [r.method_label for r in found] == labels + [label.replace("wanda", "ria") for label in labels]


def test_a_study_of_every_kind_of_recipe_reads_back(tmp_path):
    study = load(
        tmp_path,
        MINIMAL
        + """
        [[recipes]]
        method = ["wanda", "ria"]
        pattern = ["row", "2:4"]
        roles = ["q", "o"]
        [[recipes]]
        method = "sparsegpt"
        allocation = "owl"
        blocks = "0:4,30:"
        parameters = { damping = [0.01, 0.1], outlier = 7 }
        [[recipes]]
        method = "magnitude"
        refinement = "swaps"
        correction = "admm"
        recover = ["lora", "fine-tune"]
        parameters = { rounds = 5, swaps = [10, 20], steps = 50 }
        [[recipes]]
        method = ["rtn", "gptq"]
        bits = [4, 8]
        group = 64
        [imported]
        "theirs-0.5" = "somebody/pruned"
        """,
    )
    again = parse_study(tomllib.loads(study.to_toml()), "again")
    assert again == study
    assert again.jobs() == study.jobs()


def remedy(path, **changes):
    settings = {
        "model_fingerprint": "4f",
        "variant": "wanda-0.5-row-pruned-en-s0",
        "language": "sw",
        "category": "reasoning",
        "fitted_on": "half of the items",
        "importance": {"0.q": 0.01, "0.down": 0.12},
    }
    found = Remedy(**settings | changes)
    found.save(path)
    return found


DIAGNOSED = """[[recipes]]
method = "wanda"
allocation = ["uniform", "owl", "diagnosis"]
diagnosis = "found/remedy.json"
"""


def test_a_diagnosis_beside_the_study_goes_into_the_recipes_that_follow_it(tmp_path):
    found = remedy(tmp_path / "found" / "remedy.json")
    study = load(tmp_path, MINIMAL + DIAGNOSED)
    assert [r.allocation for r in study.all_recipes()] == ["uniform", "owl", "diagnosis"]
    assert [dict(r.importance) for r in study.all_recipes()] == [{}, {}, found.importance]
    path = str(tmp_path / "found" / "remedy.json")
    assert study.remedies() == {path: found}
    assert f'diagnosis = "{path}"' in study.to_toml()
    again = parse_study(tomllib.loads(study.to_toml()), "again")
    assert again == study
    assert again.jobs() == study.jobs()


def test_a_study_stays_what_it_was_when_it_was_read(tmp_path):
    remedy(tmp_path / "found" / "remedy.json")
    study = load(tmp_path, MINIMAL + DIAGNOSED)
    before = study.jobs()
    remedy(tmp_path / "found" / "remedy.json", importance={"0.q": 3.0, "0.down": 0.12})
    assert study.jobs() == before
    assert {job.id for job in load(tmp_path, MINIMAL + DIAGNOSED).jobs()} != {job.id for job in before}


def test_several_diagnoses_and_their_controls_are_recipes_of_their_own(tmp_path):
    text = MINIMAL
    for lang, value in (("sw", 1.0), ("zh", 2.0)):
        remedy(tmp_path / f"{lang}.json", language=lang, importance={"0.q": value, "0.down": 0.12})
        text += (
            f'[[recipes]]\nmethod = "wanda"\nallocation = "diagnosis"\ndiagnosis = "{lang}.json"\n'
            "parameters = { shuffle = [0, 1] }\n"
        )
    study = load(tmp_path, text)
    assert len({recipe.variant_id(None) for recipe in study.all_recipes()}) == 4
    assert [r.language for r in study.remedies().values()] == ["sw", "zh"]


def test_imported_checkpoints_are_relative_to_the_study_file(tmp_path):
    (tmp_path / "pruned").mkdir()
    study = load(tmp_path, MINIMAL + '[imported]\nours = "pruned"\nhub = "somebody/pruned"')
    assert study.imported == {"ours": str(tmp_path / "pruned"), "hub": "somebody/pruned"}


def test_relative_paths_are_relative_to_the_study_file(tmp_path):
    study = load(tmp_path, MINIMAL + '[text]\ncalibration = "file:text/{lang}.txt"\n')
    assert study.text.calibration == f"file:{tmp_path}/text/{{lang}}.txt"


def test_the_demo_asks_for_what_the_readme_says():
    study = demo_study()
    assert study.languages == ("ar", "de", "en", "es", "fr", "ru", "sw", "zh")
    names = [(s.name, s.seed) for s in study.calibration_sets()]
    assert sum(len(name) == 2 for name, seed in names if seed == 0) >= 4
    assert {("all", 0), ("sw", 1), ("en+sw", 0)} <= set(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('languages = ["en", "sw"]', 'the key "model" is missing'),
        (MINIMAL + "[evaluation]\nspecial_tokens = true", "write skip_first = false to include the first"),
        (MINIMAL + "modle = 3", 'unknown key "modle"; did you mean "model"?'),
        (
            MINIMAL + "[calibration]\nsample = 3",
            'unknown key "sample" in [calibration]; did you mean "samples"?',
        ),
        (MINIMAL + '[[recipes]]\nmethod = "wanda"\nsparsty = 0.5', 'unknown key "sparsty"'),
        ('model = "demo"\nlanguages = ["en", "xx-nope"]', 'unknown language tag "xx-nope"'),
        ('model = "demo"\nlanguages = ["en", "en"]', 'language "en" is listed twice'),
        ('model = "demo"\nlanguages = ["en"]', "languages: needs at least 2 values, not 1"),
        (MINIMAL + '[[recipes]]\nmethod = "wnada"', 'unknown method "wnada"; did you mean "wanda"'),
        (MINIMAL + '[[recipes]]\nmethod = "wanda"\nsparsity = 1.5', "sparsity 1.5 is not between 0 and 1"),
        (
            MINIMAL + '[[recipes]]\nmethod = "wanda"\npattern = "rows"',
            'unknown pattern "rows"; did you mean "row"',
        ),
        (MINIMAL + '[calibration]\nsets = ["en+swahili"]', 'did you mean "sw"'),
        (MINIMAL + "[calibration]\nsamples = 0", "greater than or equal to 1"),
        (MINIMAL + '[text]\nheldout = "bundeld"', 'unknown text source "bundeld"'),
        (MINIMAL + '[text]\nheldout = { datset = "x" }', "dataset"),
        (MINIMAL + "[evaluation]\nrank = 5", "rank 5 must be less than the number of languages, 2"),
        ("model = ", "is not TOML"),
        (
            MINIMAL + '[[recipes]]\nmethod = "wanda"\nallocation = "owls"',
            'unknown allocation "owls"; did you mean "owl"',
        ),
        (MINIMAL + '[[recipes]]\nmethod = "wanda"\npropagation = "both"', "Input should be 'pruned' or 'dense'"),
        (MINIMAL + '[[recipes]]\nmethod = "wanda"\nroles = "o"', "recipes.0.roles: should be a list in brackets"),
        (MINIMAL + '[recipes]\nmethod = "wanda"', "start each recipe with the line [[recipes]]"),
        (MINIMAL + '[[recipes]]\nmethod = "wanda"\nsparsity = []', "sparsity is an empty list"),
        (MINIMAL + '[[recipes]]\nmethod = "rtn"\nbits = []', "bits is an empty list"),
        (MINIMAL + '[[recipes]]\nmethod = "rtn"\nbits = "x"', "recipes.0.bits: Input should be a valid integer"),
        (MINIMAL + '[[recipes]]\nmethod = "rtn"', '"rtn" needs bits; write bits = 2, 3, 4 or 8'),
        (
            MINIMAL + '[[recipes]]\nmethod = ["rtn", "wanda"]\nbits = 4',
            '"wanda" prunes: bits and group are for methods',
        ),
        (MINIMAL + '[[recipes]]\nmethod = "gptq"\nbits = 4\nsparsity = 0.5', "write bits = 4 instead of sparsity"),
        (MINIMAL + '[[recipes]]\nmethod = "ria"\nparameters = { power = [] }', "power is an empty list"),
        (MINIMAL + '[[recipes]]\nmethod = "ria"\nparameters = 0.7', "such as { name = 0.5 }"),
        (MINIMAL + '[[recipes]]\nmethod = "ria"\nparameters = { power = "x" }', "recipes.0.parameters.power: Input"),
        (MINIMAL + "[calibration]\nsets = []", 'calibration.sets is empty, but "wanda" needs text'),
        (MINIMAL + "recipes = []", "this study has no models to compare"),
        (MINIMAL + '[[recipes]]\nmethod = "wanda"\npattern = "2:1"', 'such as "2:4"'),
        (MINIMAL + '[imported]\n"../x" = "y"', 'imported: "../x" is not a valid name'),
        (MINIMAL + '[imported]\ndense = "y"', '"dense" is already the name of a method or another model'),
        (MINIMAL + "[imported]\nx = 3", "imported.x"),
        (MINIMAL + '[imported]\nx = ""', 'imported: "" cannot be a model'),
        (MINIMAL.replace("demo", ""), 'model: "" cannot be a model'),
        ('device = "anything"\n' + MINIMAL, 'device: unknown device "anything"; use "auto", "cpu"'),
        ("device = 3\n" + MINIMAL, "device: should be text in quotes"),
        ("a = " + "[" * 9999, "is not TOML"),
        (MINIMAL + DIAGNOSED, "found/remedy.json; pass the remedy.json written by prunescope diagnose"),
        (MINIMAL + DIAGNOSED.replace("found/remedy", "study").replace(".json", ".toml"), "study.toml is damaged"),
        (MINIMAL + DIAGNOSED.replace(', "diagnosis"]', "]"), 'diagnosis requires allocation = "diagnosis"'),
        (MINIMAL + DIAGNOSED.replace('"found/remedy.json"', "3"), "recipes.0.diagnosis: should be text in quotes"),
        (MINIMAL + DIAGNOSED.split("diagnosis =")[0], 'allocation "diagnosis" needs importance, the file'),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, text, message):
    with pytest.raises(StudyError, match=re.escape(message)) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "study.toml" in str(caught.value)


LONG = "x" * 5000


@pytest.mark.parametrize(
    "text",
    [
        f'model = "{LONG}"\nlanguages = ["en", "sw"]',
        f'model = "demo"\nlanguages = ["en", "{LONG}"]',
        f'device = "{LONG}"\n' + MINIMAL,
        f'dtype = "{LONG}"\n' + MINIMAL,
        f"{LONG} = 3\n" + MINIMAL,
        MINIMAL + f'[text]\ncalibration = "{LONG}"',
        MINIMAL + f'[text]\ncalibration = "hub:{LONG}"',
        MINIMAL + f'[calibration]\nsets = ["{LONG}"]',
        MINIMAL + f'[calibration]\nextra = [["{LONG}", 1]]',
        MINIMAL + f'[tasks]\nitems = "{LONG}"',
        MINIMAL + f'[imported]\n"+{LONG}" = "x"',
        MINIMAL + f'[imported]\n{LONG} = "x"',
        MINIMAL + f'[imported]\nx = "{LONG}"',
        MINIMAL + f'[[recipes]]\nmethod = "{LONG}"',
        MINIMAL + f'[[recipes]]\nmethod = "ria"\nparameters = {{ {LONG} = 1 }}',
        *(
            MINIMAL + f'[[recipes]]\nmethod = "wanda"\n{key} = "{LONG}"'
            for key in ("pattern", "allocation", "propagation", "blocks", LONG)
        ),
        MINIMAL + f'[[recipes]]\nmethod = "wanda"\nroles = ["{LONG}"]',
        MINIMAL + f'[[recipes]]\nmethod = "wanda"\nallocation = "diagnosis"\ndiagnosis = "{LONG}"',
    ],
)
def test_a_very_long_name_is_repeated_in_short(tmp_path, text):
    with pytest.raises(StudyError) as caught:
        load(tmp_path, text)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_missing_study_file_points_to_the_demo(tmp_path):
    with pytest.raises(StudyError, match="prunescope run demo"):
        load_study(tmp_path / "nothing.toml")
    with pytest.raises(StudyError, match=r"cannot read the study file .*: File name too long"):
        load_study(tmp_path / ("x" * 5000))


@pytest.mark.parametrize(
    ("folder", "name"),
    [("ours/wanda-0.5", "wanda-0.5"), ("wanda", "wanda-checkpoint"), ("dense", "dense-checkpoint"), ("a/.b c", "b_c")],
)
def test_a_comparison_finds_a_name_for_any_folder(folder, name):
    study = looking_study("model", [folder], languages=["en", "sw"], segments=7)
    assert study.imported == {name: folder}
    assert study.evaluation.segments == study.evaluation.fit_segments == 7
