"""Tails of spectra, against a naive version and against spectra whose tail is known."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch

from pruning.spectrum import squared_singular_values, tail_exponent


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: np.ndarray, seed: int = 0) -> torch.Tensor:
    """Return a square float32 matrix with these squared singular values."""
    left, right = (torch.linalg.qr(noise(len(values), len(values), seed=seed + k).double())[0] for k in (1, 2))
    return ((left * torch.from_numpy(values).sqrt()) @ right.T).float()


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24), (1, 9), (7, 3000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_squared_singular_values_are_those_of_a_decomposition(shape, dtype):
    weight = noise(*shape).to(dtype)
    expected = torch.linalg.svdvals(weight.double()).flip(0).square()
    found = squared_singular_values(weight)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected[-1]))


def test_what_is_zero_within_rounding_is_zero():
    weight = noise(40, 12) @ noise(12, 30)
    weight[5] = 0
    values = squared_singular_values(weight.double())
    assert int((values > 0).sum()) == 12
    assert float(values[-12]) > 1e-3


@pytest.mark.parametrize("shape", [(64, 64), (48, 32), (32, 48), (8, 200), (3, 3)])
def test_the_exponent_equals_a_naive_version(shape):
    for seed in range(5):
        weight = noise(*shape, seed=seed) * (1 + 3 * noise(shape[0], 1, seed=seed + 9).abs() ** 3)
        assert tail_exponent(squared_singular_values(weight)) == pytest.approx(naive.tail_exponent(weight), rel=1e-6)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 4.0, 5.0])
def test_the_exponent_of_a_planted_power_law_is_found(alpha):
    """One fit to 512 values has a standard deviation of 2 % (alpha 2) to 5 % (alpha 5)."""
    generator = np.random.default_rng(0)
    found = []
    for seed in range(4):
        values = generator.pareto(alpha - 1, 512) + 1
        found.append(tail_exponent(torch.from_numpy(values)))
        if seed == 0:  # and in a matrix, of float32
            from_matrix = tail_exponent(squared_singular_values(with_spectrum(values)))
            assert from_matrix == pytest.approx(found[0], rel=1e-3)
    assert found == pytest.approx([alpha] * 4, rel=0.15)
    assert np.mean(found) == pytest.approx(alpha, rel=0.06)


def test_noise_has_a_light_tail():
    """Over 30 matrices of noise the exponent is 4.9 on average, with a standard deviation of 1.3."""
    found = [tail_exponent(squared_singular_values(noise(512, 512, seed=seed))) for seed in range(8)]
    assert 3.5 < np.mean(found) < 6.5
    assert min(found) > 2.2


def test_the_tail_begins_near_the_peak_and_not_below_it():
    """A power law that fits well, and far above its beginning a cluster: the peak of the histogram."""
    law = (1 - np.arange(500) / 500) ** -1.0  # quantiles of a power law with exponent 2
    cluster = np.geomspace(100, 106, 80)
    weight = torch.diag(torch.from_numpy(np.concatenate([law, cluster])).sqrt())
    found = tail_exponent(squared_singular_values(weight))
    assert found == pytest.approx(naive.tail_exponent(weight), rel=1e-6)
    assert found > naive.tail_exponent(weight, bounded=False) + 0.5


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.ones(5, 3), torch.eye(4)], ids=["zeros", "rank 1", "flat"])
def test_a_spectrum_without_two_different_values_has_no_exponent(weight):
    assert np.isnan(tail_exponent(squared_singular_values(weight)))


def test_the_scale_of_a_weight_does_not_matter():
    weight = noise(40, 64)
    one, other = (tail_exponent(squared_singular_values(weight * scale)) for scale in (1e-3, 1e2))
    assert one == pytest.approx(other, rel=1e-6)
