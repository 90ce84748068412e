"""A rotation, and a loss, planted in the states of a model that reads text: the geometry names each for what it is."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from analysis.frames import dense_columns
from analysis.metrics import geometry, lsar
from analysis.report.geometry import geometry_of_recipe
from probes import DENSE, Session, pooled_states, read_against_dense
from pruning import Segment

#: Languages that share two letters only.
LETTERS = {"ar": "abcdef xy", "de": "ghijkl xy", "en": "mnopqr xy", "sw": "stuvwz xy"}
SEGMENTS, HIDDEN, LAST = 96, 32, 2


def text(seed: int, number: int = SEGMENTS) -> dict[str, list[Segment]]:
    rng = np.random.default_rng(seed)
    return {
        language: [Segment(str(k), "".join(rng.choice(list(letters), rng.integers(20, 30)))) for k in range(number)]
        for language, letters in LETTERS.items()
    }


@contextmanager
def changed_stream(model, change):
    """A Llama whose last block leaves ``change(stream)`` behind in place of its residual stream."""
    block = model.model.layers[LAST]
    before: list[torch.Tensor] = []

    def mlp(module, inputs, output):
        stream = before.pop() + output
        return output + (change(stream) - stream)

    handles = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0])),
        block.mlp.register_forward_hook(mlp),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def dense():
    """A model, its readings, and the language-specific subspace of the same text after the last block.

    Of the same text: one fitted on other text would not be quite the one that is judged, and a turn inside it would
    leave that one.
    """
    model = tiny_model()
    session = Session(model, tiny_tokenizer())
    heldout = text(0)
    readings = {language: read_against_dense(session, own)[DENSE] for language, own in heldout.items()}
    fitted = lsar.fit_layers({language: pooled_states(session, own) for language, own in heldout.items()})
    return model, session, heldout, readings, fitted[LAST]


def swap(basis):
    """An orthogonal matrix that exchanges the span of a basis with another subspace of its rank."""
    other = np.random.default_rng(3).normal(size=basis.shape)
    other = np.linalg.qr(other - basis @ (basis.T @ other))[0]
    both = basis @ other.T
    return np.eye(HIDDEN) - basis @ basis.T - other @ other.T + both + both.T


def turn_inside(basis):
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(basis.shape[1],) * 2))[0]
    return np.eye(HIDDEN) + basis @ (turn - np.eye(basis.shape[1])) @ basis.T


def rotation(matrix):
    return lambda subspace: lambda stream: stream @ torch.from_numpy(matrix(subspace.basis_)).to(stream)


def loss(subspace):
    """All languages are moved to their centre inside of the subspace."""

    def change(stream):
        basis, centre = (torch.from_numpy(of).to(stream) for of in (subspace.basis_, subspace.centre_))
        return stream - (stream - centre) @ basis @ basis.T

    return change


PLANTED = {
    geometry.UNCHANGED: lambda subspace: lambda stream: stream,
    geometry.ROTATED: rotation(swap),
    geometry.ROTATED_INSIDE: rotation(turn_inside),
    geometry.LOST: loss,
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_was_planted_in_a_models_stream_is_named_at_its_block_and_nowhere_else(dense, what):
    model, session, heldout, readings, subspace = dense
    columns = {DENSE: dense_columns("m")}
    columns["v"] = columns[DENSE] | {"method": "planted"}
    with changed_stream(model, PLANTED[what](subspace)):
        changed = {("v", language): read_against_dense(session, own)[DENSE] for language, own in heldout.items()}
    ids = {language: [segment.id for segment in own] for language, own in heldout.items()}
    frame = geometry.analyze({(DENSE, name): own for name, own in readings.items()} | changed, columns, ids)
    found = geometry.verdicts(frame).dropna(subset=["layer"]).set_index("layer")["verdict"]
    assert found.to_dict() == {0: geometry.UNCHANGED, 1: geometry.UNCHANGED, LAST: what}
    said = next(iter(geometry_of_recipe({"geometry": frame}, {"method": "planted"})))
    words = {geometry.ROTATED: "rotated (its own subspace", geometry.ROTATED_INSIDE: "rotated within the dense"}
    for verdict in PLANTED:
        assert (words.get(verdict, verdict) in said) == (verdict in (what, geometry.UNCHANGED))
