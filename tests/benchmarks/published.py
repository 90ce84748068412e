"""Wanda, SparseGPT and GPTQ as their published scripts go about it, written plainly: what prunescope is timed against.

One sequence at a time; a statistic for each of a block's projections, though several read the same input; the whole
block also where only its inputs are wanted; full sorts for thresholds; for SparseGPT the inverse of the Gram matrix, its
Cholesky factor, and a column's error passed on at once to all later columns of its block. One run makes one variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from pruning import Anatomy

#: Columns of a block in SparseGPT.
BLOCK = 128
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


# -- statistics, in float32, as running means over sequences -----------------------------------------------------


class SquaredNorms:
    """Wanda's: mean over sequences of the squared norm of every input."""

    def __init__(self, inputs: int) -> None:
        self.sequences = 0
        self.value = torch.zeros(inputs)

    def add(self, x: Tensor) -> None:
        batch = len(x)
        columns = x.reshape(-1, x.shape[-1]).T.float()
        self.value *= self.sequences / (self.sequences + batch)
        self.sequences += batch
        self.value += torch.linalg.vector_norm(columns, dim=1) ** 2 / self.sequences


class Hessian:
    """SparseGPT's: twice the mean over sequences of the Gram matrix of the inputs."""

    def __init__(self, inputs: int) -> None:
        self.sequences = 0
        self.value = torch.zeros(inputs, inputs)

    def add(self, x: Tensor) -> None:
        batch = len(x)
        self.value *= self.sequences / (self.sequences + batch)
        self.sequences += batch
        columns = (2 / self.sequences) ** 0.5 * x.reshape(-1, x.shape[-1]).T.float()
        self.value += columns @ columns.T


# -- Wanda -------------------------------------------------------------------------------------------------------


def wanda(weight: Tensor, norms: SquaredNorms, sparsity: float, group: int = 0) -> None:
    """Prune a matrix in place: rows by a stable sort, or half of every `group` inputs."""
    scores = weight.abs() * norms.value.sqrt()
    if group:
        gone = torch.zeros_like(scores, dtype=torch.bool)
        for j in range(0, scores.shape[1], group):
            lowest = scores[:, j : j + group].topk(group // 2, dim=1, largest=False).indices
            gone.scatter_(1, j + lowest, True)
    else:
        order = torch.sort(scores, dim=-1, stable=True).indices
        gone = torch.zeros_like(scores, dtype=torch.bool)
        gone.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
    weight[gone] = 0


# -- SparseGPT ---------------------------------------------------------------------------------------------------


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float, group: int = 0) -> None:
    """Prune and correct a matrix in place; `hessian` is overwritten."""
    dead = hessian.diagonal() == 0
    upper = inverse_factor(hessian)
    weight[:, dead] = 0
    column_sweep(weight, upper, sparsity, group)


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix, which is overwritten."""
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower = torch.linalg.cholesky(hessian)
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)


def column_sweep(weight: Tensor, upper: Tensor, sparsity: float, group: int = 0) -> float:
    """Prune and correct a matrix in place, column by column; return the loss that the method predicts."""
    inputs = weight.shape[1]
    losses = torch.zeros(len(weight))
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        block = weight[:, begin:end].clone()
        pruned, errors, lost = (torch.zeros_like(block) for _ in range(3))
        factor = upper[begin:end, begin:end]
        scale = factor.diagonal()
        if group:
            gone = torch.zeros_like(block, dtype=torch.bool)
        else:
            scores = block**2 / scale**2
            threshold = torch.sort(scores.flatten()).values[int(scores.numel() * sparsity)]
            gone = scores <= threshold
        for j in range(end - begin):
            if group and j % group == 0:
                scores = block[:, j : j + group] ** 2 / scale[j : j + group] ** 2
                gone.scatter_(1, j + scores.topk(group // 2, dim=1, largest=False).indices, True)
            column = block[:, j]
            rest = column.clone()
            rest[gone[:, j]] = 0
            pruned[:, j] = rest
            lost[:, j] = (column - rest) ** 2 / scale[j] ** 2
            error = (column - rest) / scale[j]
            block[:, j:] -= error[:, None] @ factor[j : j + 1, j:]
            errors[:, j] = error
        weight[:, begin:end] = pruned
        losses += lost.sum(dim=1) / 2
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return float(losses.sum())


# -- ADMM on a given mask (Boza, 2024, 2401.02938) --------------------------------------------------------------------


def admm(weight: Tensor, gram: Tensor, keep: Tensor, rounds: int = 20, ridge: float = 0.1, rho: float = 1.0) -> Tensor:
    """Return the corrected weights: step by step as defined, transposes, full inverse and all, with the mask fixed."""
    norm = torch.sqrt(torch.diagonal(gram)) + 1e-8
    gram = (gram / norm).T / norm
    gram += ridge * torch.eye(len(gram))
    scaled = (weight * norm).T
    target = gram @ scaled
    inverse = torch.inverse(gram + rho * torch.eye(len(gram)))
    mask = keep.T
    dual = torch.zeros_like(scaled)
    for _ in range(rounds):
        masked = (scaled + dual) * mask
        dual += scaled - masked
        scaled = inverse @ (target + rho * (masked - dual))
    return ((scaled + dual) * mask).T / norm


# -- GPTQ --------------------------------------------------------------------------------------------------------


def gptq_sweep(weight: Tensor, upper: Tensor, bits: int, group: int = 0) -> Tensor:
    """Quantize a matrix column by column, changing it in place; return the quantized weights.

    The grid of a group is fitted on weights as of the start of the block of columns; with no groups, that of a row on
    the dense ones. It is asymmetric and spans 0, as the authors' code has it.
    """
    inputs = weight.shape[1]
    made = torch.zeros_like(weight)
    losses = torch.zeros_like(weight)
    top = torch.tensor(2**bits - 1)
    scale, zero = _grid(weight, top)
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        block = weight[:, begin:end].clone()
        rounded, errors, lost = (torch.zeros_like(block) for _ in range(3))
        factor = upper[begin:end, begin:end]
        for j in range(end - begin):
            column, pivot = block[:, j], factor[j, j]
            if group and (begin + j) % group == 0:
                scale, zero = _grid(weight[:, begin + j : begin + j + group], top)
            codes = torch.clamp(torch.round(column.unsqueeze(1) / scale) + zero, torch.tensor(0), top)
            near = (scale * (codes - zero)).flatten()
            rounded[:, j] = near
            lost[:, j] = (column - near) ** 2 / pivot**2
            error = (column - near) / pivot
            block[:, j:] -= error.unsqueeze(1).matmul(factor[j, j:].unsqueeze(0))
            errors[:, j] = error
        made[:, begin:end] = rounded
        losses[:, begin:end] = lost / 2
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return made


def _grid(weight: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.minimum(weight.min(dim=1).values, torch.zeros(len(weight)))
    high = torch.maximum(weight.max(dim=1).values, torch.zeros(len(weight)))
    empty = (low == 0) & (high == 0)
    low[empty], high[empty] = -1, 1
    scale = (high - low) / top
    return scale.unsqueeze(1), torch.round(-low / scale).unsqueeze(1)


# -- block by block ----------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Raised when all that is wanted of a forward pass has been seen."""


def at_the_first_block(anatomy: Anatomy, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
    """Return the hidden states before the first block, and what else every block is called with; no block runs."""
    hidden: list[Tensor] = []
    arguments: list[Arguments] = []

    def stand_in(states: Tensor, *positional: Any, **named: Any) -> Tensor:
        hidden.append(states)
        arguments.append((positional, named))
        return states

    with ExitStack() as undo:
        for block in anatomy.blocks:
            block.forward = stand_in
            undo.callback(delattr, block, "forward")
        anatomy.stack_module(anatomy.stacks[0])(input_ids=ids, use_cache=False)
    return hidden[0], arguments


def called(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Return a block's output."""
    output = block(hidden, *arguments[0], **arguments[1])
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def passes(anatomy: Anatomy, ids: Tensor, blocks: int, batch: int) -> None:
    """Run what no block-by-block pruning can do without, and nothing else, on full batches.

    Each block runs twice, as before it is pruned up to the input of its last product, and then as a whole; of the last
    one no output is wanted.
    """
    hidden, arguments = [], []
    for few in ids.split(batch):
        states, called_with = at_the_first_block(anatomy, few)
        hidden.append(states)
        arguments.append(called_with)

    def enough(*_: Any) -> None:
        raise _Enough

    for layer, block in enumerate(anatomy.blocks[:blocks]):
        last = anatomy.module(layer, anatomy.groups(layer)[-1].module)
        hook = last.register_forward_pre_hook(enough)
        for states, called_with in zip(hidden, arguments, strict=True):
            with suppress(_Enough):
                block(states, *called_with[layer][0], **called_with[layer][1])
        hook.remove()
        if layer + 1 < blocks:
            hidden = [called(block, s, a[layer]) for s, a in zip(hidden, arguments, strict=True)]


@torch.no_grad()
def prune(anatomy: Anatomy, ids: Tensor, method: str, sparsity: float, group: int, blocks: int) -> None:
    """Prune the first blocks of a model in place, by ``wanda`` or ``sparsegpt``."""
    statistic: type[SquaredNorms] | type[Hessian] = {"wanda": SquaredNorms, "sparsegpt": Hessian}[method]
    samples, length = ids.shape
    before = torch.zeros(samples, length, anatomy.hidden_size)
    after = torch.zeros_like(before)
    arguments: Sequence[Arguments] = ()
    for i in range(samples):
        before[i : i + 1], arguments = at_the_first_block(anatomy, ids[i : i + 1])

    for layer, block in enumerate(anatomy.blocks[:blocks]):
        projections = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        seen = {name: statistic(module.in_features) for name, module in projections.items()}
        hooks = [projections[name].register_forward_hook(_adding(seen[name])) for name in projections]
        for i in range(samples):
            after[i : i + 1] = called(block, before[i : i + 1], arguments[layer])
        for hook in hooks:
            hook.remove()
        for name, module in projections.items():
            if method == "wanda":
                wanda(module.weight.data, seen[name], sparsity, group)
            else:
                weight = module.weight.data.clone().float()
                sparsegpt(weight, seen[name].value, sparsity, group)
                module.weight.data.copy_(weight)
        for i in range(samples):
            after[i : i + 1] = called(block, before[i : i + 1], arguments[layer])
        before, after = after, before


def _adding(statistic: SquaredNorms | Hessian) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        statistic.add(inputs[0])

    return hook
