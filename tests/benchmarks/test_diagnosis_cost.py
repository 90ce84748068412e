"""What a diagnosis costs: the map of all components by attribution, and exact patching of the first twenty.

    make benchmarks

On 100 bundled items and the embedded model, over scoring the same items once with the dense model.
"""

from __future__ import annotations

import torch
from benchmarks.harness import number, paired_ratios, report, seconds

from analysis.metrics.lsar import LSAR
from analysis.metrics.recovery import components_of
from probes import DamagedModel, ItemSource, Session, attribute, item_questions, patch, score
from probes.items import some_twins
from pruning import Recipe, load_model, prune
from pruning.variants.owner import DenseModel


def test_the_map_and_its_confirmation(capsys):
    model, tokenizer = load_model("demo")
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.3))
    session = Session(model, tokenizer)
    items = some_twins(ItemSource().items("en"), 26)[:100]
    questions = item_questions(session, items)
    damage = DamagedModel(DenseModel(model), variant)
    anatomy = session.anatomy
    means = torch.randn(len(anatomy.blocks), 8, anatomy.hidden_size, dtype=torch.float64).numpy()
    components = components_of(anatomy, damage.projections, [LSAR().fit(of_layer) for of_layer in means])
    twenty = [component for component in components if component.kind == "output"][:20]

    def once() -> None:
        score(session, questions)

    def whole_map() -> None:
        attribute(session, questions, damage, components)

    def exact() -> None:
        patch(session, questions, damage, twenty)

    rounds = number("ROUNDS", 3)
    estimated = paired_ratios(whole_map, once, rounds)
    confirmed = paired_ratios(exact, once, rounds)
    assert min(estimated + confirmed) > 0
    with capsys.disabled():
        tokens = sum(question.tokens for question in questions)
        alone = sum(len(whole) for whole in _every_choice_alone(session, items))
        print(
            f"\n{len(items)} items, {tokens} tokens to read ({alone} without shared beginnings); {len(components)} components"
        )
        report(f"map of {len(components)} components by attribution / scoring once", estimated)
        report("exact patching of 20 components / scoring once", confirmed)
        print(f"seconds: scoring {seconds(once):.1f}, map {seconds(whole_map):.1f}, exact {seconds(exact):.1f}")


def _every_choice_alone(session, items):
    return [session.tokenizer(item.prompt + choice)["input_ids"] for item in items for choice in item.choices]
