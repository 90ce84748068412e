"""Pruning methods written slowly and plainly in float64 from their definitions: what the tests take as the truth.

W is [outputs, inputs], X is [tokens, inputs], a mask is True where a weight is kept. The lowest scores go; of equal
scores the first by position goes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

# Scores


def magnitude(W: Tensor) -> Tensor:
    """Magnitude: |W|."""
    return W.detach().double().abs()


def wanda(W: Tensor, X: Tensor) -> Tensor:
    """Wanda (Sun et al., ICLR 2024): |W_ij| * ||X_j||_2."""
    return magnitude(W) * _norms(X)


def wanda_sp(W: Tensor, X: Tensor) -> Tensor:
    """Wanda-sp (An et al., AAAI 2024): for every input the mean over outputs of Wanda's scores."""
    return wanda(W, X).mean(dim=0)


def ria(W: Tensor, X: Tensor, power: float = 0.5) -> Tensor:
    """RIA (Zhang et al., ICLR 2024): (|W| / column sum + |W| / row sum) * ||X_j||_2 ** power; 0 / 0 is 0."""
    size = magnitude(W)
    norms = _norms(X)
    scores = torch.zeros_like(size)
    for i in range(size.shape[0]):
        for j in range(size.shape[1]):
            if size[i, j] > 0:  # then neither sum is 0
                relative = size[i, j] / size[:, j].sum() + size[i, j] / size[i, :].sum()
                scores[i, j] = relative * norms[j] ** power
    return scores


def m_wanda(W: Tensor, X_by_language: dict[str, Tensor], spread: float = 1.0, firing: float = 1.0) -> Tensor:
    """M-Wanda (Choenni and Titov, EMNLP 2025), reconstructed from the paper.

    |W| * (mean + spread * std over languages of n_l) * p ** firing.
    """
    by_language = torch.stack(list(language_norms(X_by_language).values()))
    mean = by_language.mean(dim=0)
    std = ((by_language - mean) ** 2).mean(dim=0).sqrt()
    every_token = torch.cat(list(X_by_language.values())).double()
    share_positive = (every_token > 0).double().mean(dim=0)
    return magnitude(W) * (mean + spread * std) * share_positive**firing


def snip(gradient: Tensor, W: Tensor) -> Tensor:
    """SNIP (Lee et al., ICLR 2019): |w * dL/dw|."""
    return (W.detach().double() * gradient.detach().double()).abs()


def grasp(W: Tensor, hessian_gradient: Tensor) -> Tensor:
    """GraSP (Wang et al., ICLR 2020): it removes the largest -w * (Hg), so the lowest w * (Hg) go."""
    return W.detach().double() * hessian_gradient.detach().double()


def gblm(W: Tensor, X: Tensor, sequence_gradients: list[Tensor], slope: float = 100.0) -> Tensor:
    """GBLM (Das et al., 2023): |W| * (sqrt(sum X_j^2 / N) + slope * sqrt(128) * rms of N sequences' gradients)."""
    N = len(sequence_gradients)
    rms = (sum((g.double() ** 2 for g in sequence_gradients), torch.zeros(())) / N).sqrt()
    return magnitude(W) * (_norms(X) / math.sqrt(N) + slope * math.sqrt(128) * rms)


def gradients(loss_function: Callable[[], Tensor], weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return g = dL/dw and Hg for every weight; H is the Hessian over all these weights together, by double backward.

    The closure takes nothing and computes the loss from these very tensors: float64 leaves that require gradients.
    """
    if any(weight.dtype != torch.float64 for weight in weights):
        raise TypeError("the weights must be float64")
    loss = loss_function()
    if loss.dtype != torch.float64:
        raise TypeError("the loss must be computed in float64")
    first = torch.autograd.grad(loss, weights, create_graph=True)
    along = torch.zeros((), dtype=torch.float64)
    for gradient in first:
        along = along + (gradient * gradient.detach()).sum()
    second = torch.autograd.grad(along, weights, allow_unused=True, materialize_grads=True)
    return [gradient.detach() for gradient in first], [product.detach() for product in second]


# Patterns


def keep_row(scores: Tensor, s: float) -> Tensor:
    """Remove the floor(inputs * s) lowest of every row."""
    return torch.stack([_keep_all_but_lowest(row, _count(row.numel(), s)) for row in scores])


def keep_matrix(scores: Tensor, s: float) -> Tensor:
    """Remove the floor(numel * s) lowest of the matrix; positions count along the rows."""
    return _keep_all_but_lowest(scores, _count(scores.numel(), s))


def keep_model(scores: dict[str, Tensor], s: float) -> dict[str, Tensor]:
    """Remove the floor(n * s) lowest of all matrices together; positions count in the order of the keys."""
    everything = torch.cat([matrix.reshape(-1) for matrix in scores.values()])
    keep = _keep_all_but_lowest(everything, _count(everything.numel(), s))
    masks: dict[str, Tensor] = {}
    start = 0
    for key, matrix in scores.items():
        masks[key] = keep[start : start + matrix.numel()].reshape(matrix.shape)
        start += matrix.numel()
    return masks


def keep_n_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Remove the n lowest of every m consecutive inputs of every row."""
    outputs, inputs = scores.shape
    if inputs % m:
        raise ValueError(f"{inputs} inputs are not a multiple of {m}")
    keep = torch.ones(outputs, inputs, dtype=torch.bool)
    for i in range(outputs):
        for a in range(0, inputs, m):
            keep[i, a : a + m] = _keep_all_but_lowest(scores[i, a : a + m], n)
    return keep


def flap(W: Tensor, X: Tensor) -> Tensor:
    """FLAP (An et al., AAAI 2024): for every input its variance times the squared norm of the weights that read it."""
    W, X = W.detach().double(), X.detach().double()
    return ((X - X.mean(dim=0)) ** 2).mean(dim=0) * (W**2).sum(dim=0)


def firing(W: Tensor, pruned: Tensor, X: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return weights and biases with which each output keeps the ratio of its mean and standard deviation."""
    W, pruned, X = W.detach().double(), pruned.detach().double().clone(), X.detach().double()
    biases = torch.zeros(len(W), dtype=torch.float64) if bias is None else bias.detach().double().clone()
    for i in range(len(W)):
        dense, left = X @ W[i] + biases[i], X @ pruned[i]
        if scale:
            pruned[i] *= dense.std(correction=0) / left.std(correction=0)
            left = X @ pruned[i]
        biases[i] = dense.mean() * left.std(correction=0) / dense.std(correction=0) - left.mean()
    return pruned, biases


def block_influence(before: Tensor, after: Tensor) -> float:
    """ShortGPT (Men et al., 2024): 1 - mean over tokens of the cosine of the states before and after a block."""
    before, after = before.detach().double(), after.detach().double()
    cosines = (before * after).sum(dim=1) / ((before**2).sum(dim=1) * (after**2).sum(dim=1)).sqrt()
    return 1 - float(cosines.mean())


def z_scores(values: Tensor) -> Tensor:
    """Subtract the mean, divide by the sample standard deviation."""
    apart = values - values.mean()
    return apart / ((apart**2).sum() / (len(values) - 1)).sqrt()


# Structures: a unit is a list of (role, rows, columns), the weights that belong to it


def units(anatomy: Any, layer: int, pattern: str) -> dict[str, list[list[tuple[str, slice, slice]]]]:
    """Return the neurons and heads of a block by the role that reads them; heads with common keys are one unit."""
    found: dict[str, list[list[tuple[str, slice, slice]]]] = {}
    everything = slice(None)
    for role in anatomy.roles(layer):
        if "down" in role and "neurons" in pattern:
            writers = [role.replace("down", "gate"), role.replace("down", "up")]
            found[role] = [
                [(writer, slice(n, n + 1), everything) for writer in writers if writer in anatomy.roles(layer)]
                + [(role, everything, slice(n, n + 1))]
                for n in range(anatomy.weight(layer, role).shape[1])
            ]
        if role in ("o", "cross_o") and "heads" in pattern:
            q, k, v = (role.replace("o", name, 1) if role == "o" else f"cross_{name}" for name in "qkv")
            heads = anatomy.config.num_attention_heads
            shared = heads // (getattr(anatomy.config, "num_key_value_heads", None) or heads)
            size = anatomy.weight(layer, role).shape[1] // heads
            found[role] = []
            for n in range(heads) if shared == heads else range(heads // shared):
                queries = 1 if shared == heads else shared
                mine = slice(n * queries * size, (n + 1) * queries * size)
                unit = [(q, mine, everything), (role, everything, mine)]
                if shared < heads or heads == 1:
                    keys = slice(n * size, (n + 1) * size)
                    unit += [(k, keys, everything), (v, keys, everything)]
                found[role].append(unit)
    return found


def keep_units(scores: list[float], s: float) -> list[bool]:
    """Remove the floor(n * s) lowest units."""
    return _keep_all_but_lowest(torch.tensor(scores, dtype=torch.float64), _count(len(scores), s)).tolist()


# SparseGPT


def sparsegpt(
    W: Tensor,
    X: Tensor,
    sparsity: float | None = None,
    pattern: str | tuple[int, int] = "matrix",
    block: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """SparseGPT (Frantar and Alistarh, ICML 2023): return the mask and the corrected weights.

    The pattern is "matrix", "row" or (n, m), n removed of every m; a sparsity goes with the first two only.
    """
    if not isinstance(pattern, tuple) and pattern not in ("matrix", "row"):
        raise ValueError(f"unknown pattern {pattern!r}")
    if isinstance(pattern, tuple) != (sparsity is None):
        raise ValueError("give a sparsity with 'matrix' and 'row', and none with (n, m)")
    share = 0.0 if sparsity is None else sparsity
    W = W.detach().double().clone()
    X = X.detach().double()
    outputs, inputs = W.shape
    H = X.T @ X
    for j in range(inputs):
        if H[j, j] == 0:
            H[j, j] = 1
            W[:, j] = 0
    H = H + damping * H.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)

    keep = torch.ones(outputs, inputs, dtype=torch.bool)
    for j in range(inputs):
        # Every column before j is done, and its error has reached W[:, j:]: choose here what goes next.
        if isinstance(pattern, tuple):
            n, m = pattern
            if j % m == 0:
                keep[:, j : j + m] = keep_n_m(_saliency(W, U, j, j + m), n, m)
        elif j % block == 0:
            a, b = j, min(j + block, inputs)
            scores = _saliency(W, U, a, b)
            if pattern == "matrix":
                total = _count(W.numel(), share)
                keep[:, a:b] = _keep_all_but_lowest(scores, total * b // inputs - total * a // inputs)
            else:
                total = _count(inputs, share)
                for i in range(outputs):
                    keep[i, a:b] = _keep_all_but_lowest(scores[i], total * b // inputs - total * a // inputs)
        pruned = torch.where(keep[:, j], W[:, j], 0.0)
        error = (W[:, j] - pruned) / U[j, j]
        for later in range(j + 1, inputs):
            W[:, later] -= error * U[j, later]
        W[:, j] = pruned
    return keep, W


# DSnoT


def dsnot(W: Tensor, X: Tensor, keep: Tensor, group: int = 0, cycles: int = 50, tolerance: float = 0.1) -> Tensor:
    """DSnoT (Zhang et al., ICLR 2024): exchange weights, row by row, until |E| <= tolerance; group is m of n:m, else 0.

    E is the sum over pruned weights of w_j S_j, S_j the sum of input j over 2048 average tokens. No weight moves twice.
    """
    W, X, keep = W.detach().double(), X.detach().double(), keep.clone()
    S = 2048 * X.mean(dim=0)
    variance = ((X - X.mean(dim=0)) ** 2).mean(dim=0)
    scores = wanda(W, X).tolist()
    for i in range(W.shape[0]):
        adds = [float(W[i, j] * S[j]) for j in range(W.shape[1])]
        gone = [j for j in range(W.shape[1]) if not keep[i, j]]
        left = [j for j in range(W.shape[1]) if keep[i, j]]
        E = sum(adds[j] for j in gone)
        first = math.copysign(1, E)
        for _ in range(int(cycles)):
            sign = math.copysign(1, E)
            if abs(E) <= tolerance or (group and sign != first):
                break
            against = [k for k in left if adds[k] * sign < 0]
            lowest = {}  # of each group, the kept weight with the lowest score
            for k in against:
                g = k // group if group else 0
                if g not in lowest or scores[i][k] < scores[i][lowest[g]]:
                    lowest[g] = k
            pairs = {j: lowest.get(j // group if group else 0) for j in gone if adds[j] * sign > 0}
            pairs = {j: k for j, k in pairs.items() if k is not None}
            if not pairs:
                break
            j = max(pairs, key=lambda j: abs(adds[j]) / float(variance[j]))
            k = pairs[j]
            keep[i, j], keep[i, k] = True, False
            gone.remove(j)
            left.remove(k)
            E += adds[k] - adds[j]
    return keep


def reconstruction_error(W: Tensor, W_new: Tensor, X: Tensor) -> float:
    """Return ||X (W - W_new)^T||^2."""
    return float(((X.double() @ (W.double() - W_new.double()).T) ** 2).sum())


# Refinement and correction


def swaps(W: Tensor, keep: Tensor, X: Tensor, most: int, group: int = 0) -> Tensor:
    """Return the mask after up to `most` swaps a row, each the best of all pairs (of one group of inputs, if any)."""
    W, X = W.detach().double(), X.detach().double()
    keep = keep.clone()
    inputs = W.shape[1]
    for w, kept in zip(W, keep, strict=True):
        for _ in range(most):
            before = float(((X @ (w * ~kept)) ** 2).sum())
            best, pair = before * (1 - 1e-6), None
            for i in range(inputs):
                for j in range(inputs):
                    if kept[i] and not kept[j] and (group == 0 or i // group == j // group):
                        other = kept.clone()
                        other[i], other[j] = False, True
                        after = float(((X @ (w * ~other)) ** 2).sum())
                        if after < best:
                            best, pair = after, (i, j)
            if pair is None:
                break
            kept[pair[0]], kept[pair[1]] = False, True
    return keep


def least_squares(W: Tensor, keep: Tensor, X: Tensor) -> Tensor:
    """Return the weights on a mask whose outputs are nearest to the dense ones; of several, those changed least."""
    W, X = W.detach().double(), X.detach().double()
    new = torch.zeros_like(W)
    for w, kept, row in zip(W, keep, new, strict=True):
        lost = X @ (w * ~kept)
        row[kept] = w[kept] + torch.linalg.lstsq(X[:, kept], lost, driver="gelsd").solution
    return new


def admm(W: Tensor, keep: Tensor, X: Tensor, ridge: float = 0.1, penalty: float = 1.0, rounds: int = 20) -> Tensor:
    """ADMM on a mask (Boza, 2024), all its steps as published; a row that it makes worse keeps its dense weights."""
    W, X = W.detach().double(), X.detach().double()
    G = X.T @ X
    c = G.diagonal().sqrt() + 1e-8
    identity = torch.eye(len(G), dtype=torch.float64)
    H = G / c[:, None] / c[None, :] + ridge * identity
    target = W * c @ H
    inverse = torch.linalg.inv(H + penalty * identity)
    V, U = W * c, torch.zeros_like(W)
    for _ in range(rounds):
        Z = (V + U) * keep
        U = U + V - Z
        V = (target + penalty * (Z - U)) @ inverse
    new = (V + U) * keep / c
    worse = ((X @ (W - new).T) ** 2).sum(dim=0) >= ((X @ (W * ~keep).T) ** 2).sum(dim=0)
    return torch.where(worse[:, None], W * keep, new)


# Sparsities of blocks


def owl_block_sparsities(
    wanda_scores_by_block: list[list[Tensor]], s: float, outlier: float = 5.0, spread: float = 0.08
) -> list[float]:
    """OWL (Yin et al., ICML 2024): blocks with a larger share of scores above outlier * mean stay denser."""
    shares, sizes = [], []
    for block in wanda_scores_by_block:
        scores = torch.cat([matrix.detach().double().reshape(-1) for matrix in block])
        above = int((scores > outlier * scores.mean()).sum())
        shares.append(above / scores.numel())
        sizes.append(scores.numel())
    return [s - shift for shift in _shifts(shares, sizes, spread)]


def cross_lingual_block_sparsities(
    norms_by_block: list[list[dict[str, Tensor]]],
    s: float,
    spread: float = 0.08,
    sign: int = 1,
    sizes: list[int] | None = None,
) -> list[float]:
    """M-Wanda's allocation as reconstructed from the paper, from the mean correlation of n_l between languages.

    A block is a list over groups of inputs of language -> n_l; sizes are the blocks' numbers of weights (None: equal).
    """
    correlations = []
    for groups in norms_by_block:
        by_group = []
        for norms in groups:
            if len(norms) < 2:
                raise ValueError("a correlation between languages needs two")
            pairs = [_pearson(one, other) for one, other in combinations(norms.values(), 2)]
            by_group.append(sum(pairs) / len(pairs))
        correlations.append(sum(by_group) / len(by_group))
    if sizes is None:
        sizes = [1] * len(correlations)
    return [s + sign * shift for shift in _shifts(correlations, sizes, spread)]


def diagnosis_sparsities(
    importance: dict[tuple[int, str], float], sizes: dict[tuple[int, str], int], s: float, spread: float = 0.08
) -> dict[tuple[int, str], float]:
    """Matrices of a higher rank by importance stay denser; equal importances share the mean of their ranks."""
    ranks = []
    for value in importance.values():
        places = [place for place, other in enumerate(sorted(importance.values()), start=1) if other == value]
        ranks.append(sum(places) / len(places))
    shifts = _shifts(ranks, [sizes[key] for key in importance], spread)
    return {key: s - shift for key, shift in zip(importance, shifts, strict=True)}


def tail_exponent(W: Tensor, *, bounded: bool = True) -> float:
    """AlphaPruning's alpha (Lu et al., NeurIPS 2024): 1 + n / sum ln(l / l_min) over the n values from l_min on.

    Of the squared singular values between 0.95 and 1.5 times the peak, l_min is the one with the smallest distance
    between the empirical and the fitted distribution function. Unless bounded, the lower bound is the logarithm of what
    it should be, as in the published code.
    """
    values = sorted(float(s) ** 2 for s in torch.linalg.svdvals(W.detach().double()))
    values = [value for value in values if value > 1e-12 * values[-1]]
    low, high = math.log10(values[0]), math.log10(values[-1])
    counts = [0] * 100
    for value in values:
        counts[min(int((math.log10(value) - low) / (high - low) * 100), 99)] += 1
    peak = 10 ** (low + counts.index(max(counts)) * (high - low) / 100)
    least = 0.95 * peak if bounded else math.log10(0.95 * peak)
    fits = []
    for i, start in enumerate(values[:-1]):
        if least <= start <= 1.5 * peak:
            tail = values[i:]
            n = len(tail)
            alpha = 1 + n / sum(math.log(value / start) for value in tail)
            distance = 0.0
            for j, value in enumerate(tail):
                share = 1 - (value / start) ** (1 - alpha)
                distance = max(distance, abs(share - j / n), abs(share - (j + 1) / n))
            fits.append((distance, alpha))
    return min(fits)[1]


def alpha_block_sparsities(
    matrices_by_block: list[list[Tensor]], s: float, spread: float = 0.08, sizes: list[int] | None = None
) -> list[float]:
    """AlphaPruning's allocation: blocks with a smaller mean alpha stay denser; shifted as OWL shifts."""
    alphas = [sum(map(tail_exponent, block)) / len(block) for block in matrices_by_block]
    sizes = sizes or [sum(matrix.numel() for matrix in block) for block in matrices_by_block]
    return [s + shift for shift in _shifts(alphas, sizes, spread)]


def language_norms(X_by_language: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return M-Wanda's n_l: each language's ||X_j||_2 as if all languages had their mean number of tokens."""
    mean_tokens = sum(X.shape[0] for X in X_by_language.values()) / len(X_by_language)
    return {
        language: ((X.double() ** 2).sum(dim=0) / X.shape[0] * mean_tokens).sqrt()
        for language, X in X_by_language.items()
    }


# Parts of the above


def _count(n: int, s: float) -> int:
    """Return how many of n go at sparsity s."""
    return math.floor(n * s + 1e-9)


def _keep_all_but_lowest(scores: Tensor, k: int) -> Tensor:
    """Remove the k lowest; sorted() is stable, so of equal scores the first goes first."""
    values = scores.reshape(-1).tolist()
    keep = [True] * len(values)
    for position in sorted(range(len(values)), key=values.__getitem__)[:k]:
        keep[position] = False
    return torch.tensor(keep, dtype=torch.bool).reshape(scores.shape)


def _norms(X: Tensor) -> Tensor:
    return (X.detach().double() ** 2).sum(dim=0).sqrt()


def _saliency(W: Tensor, U: Tensor, a: int, b: int) -> Tensor:
    """Return SparseGPT's w^2 / U_jj^2 of columns a to b."""
    return W[:, a:b] ** 2 / U.diagonal()[a:b] ** 2


def _pearson(x: Tensor, y: Tensor) -> float:
    """Return the correlation of two vectors, 0 if one is constant."""
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x * y).sum() / ((x**2).sum() * (y**2).sum()).sqrt())


def _shifts(values: list[float], sizes: list[int], spread: float) -> list[float]:
    """Map values min-max onto a range of 2 * spread and take off their mean by size; equal values (to 1e-12) give 0."""
    low, high = min(values), max(values)
    if high - low <= 1e-12:
        return [0.0] * len(values)
    ratios = [(value - low) / (high - low) * 2 * spread for value in values]
    mean = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes)
    return [ratio - mean for ratio in ratios]


# Quantization


def fitted(part: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale (computed in float32, rounded to 16 bits) and zero point of the grid of every row of some weights."""
    low = torch.minimum(part.min(dim=1).values, torch.zeros(len(part)))
    high = torch.maximum(part.max(dim=1).values, torch.zeros(len(part)))
    spread = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = (spread.float() / (2**bits - 1)).half().double().clamp(min=2.0**-24)
    scale[spread == 0] = 1
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, 2**bits - 1)
    return scale, zero


def nearest(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the values of the grids that are nearest to some weights; halfway to the even code."""
    return ((values / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


def rtn(W: Tensor, bits: int, group: int, symmetric: bool = False) -> Tensor:
    """Round every weight to the nearest value of the grid of its group of inputs (0: of its row)."""
    W = W.detach().double()
    width = group or W.shape[1]
    made = torch.zeros_like(W)
    for a in range(0, W.shape[1], width):
        scale, zero = fitted(W[:, a : a + width], bits, symmetric)
        for j in range(a, a + width):
            made[:, j] = nearest(W[:, j], scale, zero, bits)
    return made


def gptq(
    W: Tensor,
    X: Tensor,
    bits: int,
    group: int,
    symmetric: bool = False,
    damping: float = 0.01,
    order: bool = False,
    static: bool = False,
) -> Tensor:
    """GPTQ (Frantar et al., ICLR 2023): grids of groups on updated weights; static or with an order, on dense ones."""
    W = W.detach().double().clone()
    X = X.detach().double()
    inputs = W.shape[1]
    width = group or inputs
    H = X.T @ X
    W[:, H.diagonal() == 0] = 0
    columns = list(range(inputs))
    if order:
        columns.sort(key=lambda j: -float(H[j, j]))
    for j in range(inputs):
        if H[j, j] == 0:
            H[j, j] = 1
    H = H + damping * H.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    H = H[columns][:, columns]
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    grids = {}
    if order or static or not group:
        for a in range(0, inputs, width):
            grids[a] = fitted(W[:, a : a + width], bits, symmetric)
    made = torch.zeros_like(W)
    for k, j in enumerate(columns):
        a = j - j % width
        if a not in grids:
            grids[a] = fitted(W[:, a : a + width], bits, symmetric)
        made[:, j] = nearest(W[:, j], *grids[a], bits)
        error = (W[:, j] - made[:, j]) / U[k, k]
        W[:, columns[k + 1 :]] -= torch.outer(error, U[k, k + 1 :])
    return made


def awq(
    weights: dict[str, Tensor], X: Tensor, bits: int, group: int, symmetric: bool = False, clip: bool = True
) -> dict[str, Tensor]:
    """AWQ (Lin et al., MLSys 2024) of matrices that read the same input, by role; errors are of their own outputs."""
    X = X.detach().double()
    dense = {role: W.detach().double() for role, W in weights.items()}
    magnitude = X.abs().mean(dim=0).clamp(min=1e-4)
    best, least = torch.ones_like(magnitude), math.inf
    for step in range(20):
        s = (magnitude ** (step / 20)).clamp(min=1e-4)
        s = (s / (s.max() * s.min()).sqrt()).half().double()
        error = sum(reconstruction_error(W, rtn(W * s, bits, group, symmetric) / s, X) for W in dense.values())
        if error < least:
            best, least = s, error
    made = {}
    for role, W in dense.items():
        scaled = W * best
        if clip and role not in ("q", "k"):
            width = group or W.shape[1]
            for a in range(0, W.shape[1], width):
                part, x = scaled[:, a : a + width].clone(), X[:, a : a + width] / best[a : a + width]
                limit = part.abs().amax(dim=1, keepdim=True)
                lowest = torch.full((len(part),), math.inf, dtype=torch.float64)
                for step in range(10):
                    to = limit * (1 - step / 20)
                    clipped = part.clamp(-to, to)
                    wrong = ((x @ (part - rtn(clipped, bits, 0, symmetric)).T) ** 2).sum(dim=0)
                    better = wrong < lowest
                    scaled[better, a : a + width] = clipped[better]
                    lowest = torch.minimum(lowest, wrong)
        made[role] = rtn(scaled, bits, group, symmetric) / best
    return made
