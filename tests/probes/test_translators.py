"""Translators are the ridge regression that they are said to be, and a tuned lens reads through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes import DENSE, Session, TokenLanguages, fit_translators, read_lens
from probes.lens import LENSES, SHARED, UNSEEN
from probes.readers.lens import LENS_SUMS
from probes.readers.sampled import Sample
from probes.translators import RIDGES, Translators, fitted
from pruning import Anatomy, Recipe, Segment, prune
from pruning.errors import StudyError, TextError

KL = LENS_SUMS.index("kl")
KINDS = TokenLanguages(("en", SHARED, UNSEEN), torch.arange(300) % 3)


def states_and_final(positions=400, hidden=12, noise=0.0, seed=0):
    """States of very unequal scales, and final ones that are an affine map of them, plus noise."""
    random = np.random.default_rng(seed)
    states = random.normal(2, 1, (positions, hidden)) * np.geomspace(0.1, 1000, hidden)
    final = states @ (random.normal(0, 1, (hidden, hidden)) / np.geomspace(0.1, 1000, hidden)[:, None]) + 3
    return states, final + noise * random.normal(0, 1, final.shape)


def as_tensors(*arrays):
    left_out = torch.arange(len(arrays[0])) % 8 == 0
    return *(torch.from_numpy(array).float() for array in arrays), left_out


def test_a_translator_is_the_ridge_regression_of_the_change():
    states, final = states_and_final(noise=2.0)
    found = fitted(*as_tensors(states, final))
    ridge = float(found.ridge)
    used = np.arange(len(states)) % 8 != 0
    centre, spread = states[used].mean(axis=0), states[used].std(axis=0)
    change = (final - states)[used]
    x, n = (states[used] - centre) / spread, used.sum()
    system = np.concatenate([x / n**0.5, ridge**0.5 * np.eye(x.shape[1])])
    wanted = np.concatenate([(change - change.mean(axis=0)) / n**0.5, np.zeros((x.shape[1], x.shape[1]))])
    weight = np.linalg.lstsq(system, wanted, rcond=None)[0]
    expected = states + (states - centre) / spread @ weight + change.mean(axis=0)
    translated = found(torch.from_numpy(states).float()).numpy()
    np.testing.assert_allclose(translated, expected, rtol=1e-3, atol=1e-3)
    error = ((expected - final)[~used] ** 2).mean(axis=0) / final[used].var(axis=0)
    assert float(found.explained) == pytest.approx(1 - error.mean(), abs=1e-4)


def test_an_affine_map_is_found_and_noise_is_not():
    exact = fitted(*as_tensors(*states_and_final()))
    assert exact.explained > 0.999
    assert float(exact.ridge) == pytest.approx(RIDGES[0])
    states, final = states_and_final(positions=60)
    unrelated = np.random.default_rng(1).normal(0, 1, final.shape)
    nothing = fitted(*as_tensors(states * 1e-3, unrelated))
    assert nothing.explained < 0.1
    assert float(nothing.ridge) == RIDGES[-1]


def text(language, segments=24):
    random = np.random.default_rng(sum(map(ord, language)))
    letters = "abcdefgh" if language == "en" else "ijklmnop"
    return [Segment(str(i), "".join(random.choice(list(letters), 24))) for i in range(segments)]


TEXT = {"en": text("en"), "sw": text("sw")}


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_a_tuned_lens_reads_translated_states(make_model, kind, tokenizer, segments, tmp_path):
    model = make_model(kind)
    anatomy, session = Anatomy(model), Session(model, tokenizer, batch_tokens=60)
    translators = fit_translators(session, TEXT, tmp_path / "translators")
    assert sorted(path.name for path in (tmp_path / "translators").iterdir()) == ["0.safetensors", "1.safetensors"]
    variant = prune(model, tokenizer, [Recipe(method="magnitude", sparsity=0.4)])[0]
    found = read_lens(session, segments, KINDS, [variant], tokens=30, translators=translators)
    plain = read_lens(session, segments, KINDS, [variant], tokens=30)
    sample = Sample.of(session.batches(segments), 30)
    expected = torch.zeros(3, dtype=torch.float64)
    for number, segment in enumerate(segments):
        ids, where = (
            tokenizer(segment.text, return_tensors="pt")["input_ids"],
            sample.position[sample.segment == number],
        )
        with torch.no_grad():
            p = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)[where]
            with variant.applied(model):
                states = states_after_blocks(model, anatomy, ids)
            for layer, state in enumerate(states):
                translated = translators.translate(layer, state[0])
                q = anatomy.logits(anatomy.normed(translated)).double().log_softmax(dim=-1)[where]
                expected[layer] += (p.exp() * (p - q)).sum()
    logit, tuned = (LENSES.index(name) for name in ("logit", "tuned"))
    for name, read in found.items():
        torch.testing.assert_close(read.sums[logit], plain[name].sums[0])
        torch.testing.assert_close(read.sums[tuned, -1], read.sums[logit, -1])  # the last block needs none
    torch.testing.assert_close(found[variant.id].sums[tuned, ..., KL].sum(dim=1), expected, rtol=1e-3, atol=1e-3)
    explained = translators.explained()
    assert list(explained) == [0, 1]
    assert 0.2 < explained[0] < explained[1] < 1


def states_after_blocks(model, anatomy, ids):
    states = []
    handles = [
        block.register_forward_hook(lambda module, inputs, output: states.append(output)) for block in anatomy.blocks
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return [state[0] if isinstance(state, tuple) else state for state in states]


def test_states_in_the_basis_of_the_head_are_read_as_well_in_any_other(model, tokenizer, tmp_path):
    """What the last block does is undone for a lens that was fitted on it: it turns the stream round."""
    last = model.model.layers[2]
    torch.nn.init.zeros_(last.self_attn.o_proj.weight)
    session = Session(model, tokenizer)
    translators = fit_translators(session, TEXT, tmp_path / "translators")
    heldout = [Segment(str(i), segment.text[::-1]) for i, segment in enumerate(TEXT["en"][:8])]
    read = read_lens(session, heldout, KINDS, tokens=60, translators=translators)[DENSE]
    kl = read.sums[..., KL].sum(dim=2)
    assert (kl[1, :2] < 0.7 * kl[0, :2]).all()


def test_too_little_text_to_test_a_fit_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(TextError, match="several segments"):
        fit_translators(Session(model, tokenizer), {"en": TEXT["en"][:1]}, tmp_path / "translators")
    assert not (tmp_path / "translators").exists()


def test_a_damaged_file_is_told(model, tokenizer, tmp_path):
    fit_translators(Session(model, tokenizer), TEXT, tmp_path)
    path = tmp_path / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StudyError, match="damaged"):
        Translators({1: path}, torch.device("cpu")).at(1)
