"""Models with planted damage, and their diagnosis."""

from __future__ import annotations

import numpy as np
import torch

from analysis import LSAR
from analysis.frames import dense_columns
from analysis.metrics.recovery import Asked, components_of, diagnose
from probes import Session, item_questions
from probes.items import Item
from probes.patching import DamagedModel
from probes.scoring import score
from pruning import Anatomy, Recipe, prune
from pruning.variants.masks import MaskSet
from pruning.variants.owner import DenseModel
from pruning.variants.store import VariantRecord
from pruning.variants.variant import Variant

COLUMNS = dense_columns("m") | {"method": "planted", "sparsity": 0.1}


def planted_variant(model, change):
    """A variant that keeps all weights but those that `change` takes out of the masks."""
    anatomy = Anatomy(model)
    masks = {key: torch.ones(anatomy.shape(*key), dtype=torch.bool) for key in anatomy}
    change(masks)
    return Variant(
        VariantRecord(id="planted", model="m", model_fingerprint=anatomy.fingerprint()), MaskSet.pack(masks), {}
    )


def subspaces_of(model, rank=2):
    rng = np.random.default_rng(5)
    return [LSAR(rank).fit(rng.normal(size=(4, 32))) for _ in Anatomy(model).blocks]


def questions_that_suffer(session, damage, number=16):
    """Items in pairs of twins; of their random choices that is right which the damage hurts more."""
    rng = np.random.default_rng(2)
    letters = list("abcdefghijklmnopqrstuvwxyz ")

    def text(length):
        return "".join(rng.choice(letters, length))

    items = [
        Item(id=str(i), twin=str(i // 2), prompt=text(9 + i % 5), choices=(text(2), text(2), text(2)), answer=0)
        for i in range(number)
    ]
    questions = item_questions(session, items)
    dense = score(session, questions).values
    with damage.damaged():
        pruned = score(session, questions).values
    answers = (dense - pruned).argmax(axis=1)
    items = [item.model_copy(update={"answer": int(answer)}) for item, answer in zip(items, answers, strict=True)]
    return Asked("mine", "reasoning", "sw", item_questions(session, items), [item.twin for item in items])


def diagnosed(model, tokenizer, damage, asked=None, components=None, skip_first=True, **settings):
    session = Session(model, tokenizer, skip_first=skip_first)
    asked = asked or questions_that_suffer(session, damage)
    components = components or components_of(session.anatomy, damage.projections, subspaces_of(model), draws=3)
    return diagnose(session, damage, asked, components, COLUMNS, **settings)


def pruned_and_diagnosed(language_neurons=None, draws=1, **settings):
    """A model with three in ten of its weights, questions that suffer from it, and what a diagnosis makes of them."""
    from conftest import tiny_model, tiny_tokenizer

    model = tiny_model()
    (variant,) = prune(model, tiny_tokenizer(), Recipe(method="magnitude", sparsity=0.7))
    session = Session(model, tiny_tokenizer())
    damage = DamagedModel(DenseModel(model), variant)
    asked = questions_that_suffer(session, damage)
    components = components_of(session.anatomy, damage.projections, subspaces_of(model), language_neurons, draws=draws)
    return session, damage, asked, components, diagnose(session, damage, asked, components, COLUMNS, **settings)
