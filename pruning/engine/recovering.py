"""Fine-tuning the kept weights of a variant on its calibration text, with the whole model in memory.

The model computes with the variant's weights. Each backward pass gives the gradient of one stored parameter after the
other; what is trained takes its share of it at once, and the gradient is freed. So no more than one gradient of the
model's own parameters is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.anatomy import Anatomy
from ..projections import Key
from ..recovery import Trained, recovery_named
from ..text.calibration import CalibrationText
from ..variants.masks import unpack_bits
from ..variants.owner import DenseModel
from ..variants.variant import Variant
from .jobs import Job, covered_shapes, projection_seed
from .loss import BACKWARD, GRADIENT_TOKENS, checked_finite, differentiable, token_loss
from .streams import Progress
from .workspace import kept_values

#: Largest norm of the gradient of all that is trained; a longer one is scaled down. As transformers' trainer has it.
_LONGEST = 1.0
_FLOAT = 4


@contextmanager
def recovering(
    owner: DenseModel, variant: Variant, text: CalibrationText, progress: Progress = lambda tokens: None
) -> Iterator[Variant]:
    """Context manager that fine-tunes a variant as its recipe says, and restores the dense model bit for bit.

    Parameters
    ----------
    owner
        The dense model, in memory. It is the fine-tuned variant inside of the ``with`` block.
    variant
        The variant to start from, with the recipe and calibration set of the result.
    text
        Text of its calibration set.
    progress
        Called with the number of tokens that passed through a block; :func:`recovery_work` in total, also if it fails.

    Yields
    ------
    Variant
        The fine-tuned variant, whose values are read from the model on access.

    Raises
    ------
    ModelError
        If the loss is not finite.
    """
    calibration = variant.record.calibration
    assert calibration is not None
    assert variant.record.recipe is not None
    left = recovery_work(owner.anatomy, [Job(variant.record.recipe, calibration)])

    def told(tokens: int) -> None:
        nonlocal left
        left -= tokens
        progress(tokens)

    sequences = torch.cat([text.tokens[piece] for piece in text.pieces[calibration]])
    with owner.pruned_to(variant):
        keys = [key for key in variant.masks if variant.masks.kept(key)]
        try:
            remark = _trained(owner, variant, keys, sequences, told)
        finally:
            progress(left)
        record = variant.record.model_copy(update={"remarks": (*variant.record.remarks, remark)})
        yield replace(variant, record=record, values=_InModel(owner.anatomy, variant, keys))


def recovery_work(anatomy: Anatomy, jobs: Iterable[Job]) -> int:
    """Return how many tokens would take a forward pass through a block as long as fine-tuning for some jobs."""
    return len(anatomy.blocks) * sum(recovery_tokens(job) for job in jobs)


def recovery_tokens(job: Job) -> int:
    """Return how many tokens would take a forward pass as long as fine-tuning for a job; 0 if it does not recover."""
    if not job.recipe.recovers or job.calibration is None:
        return 0
    settings, length = job.recipe.recovery_parameters, job.calibration.length
    trained = int(settings["steps"] * settings["batch"]) * length
    return trained * _passes(length) + 2 * job.calibration.samples * length  # the loss before and after


def _passes(length: int) -> int:
    """Return how often tokens pass forward for one backward pass, which counts as two."""
    return BACKWARD + (length > GRADIENT_TOKENS)


def recovery_memory(anatomy: Anatomy, jobs: Iterable[Job]) -> tuple[int, int]:
    """Return the bytes that fine-tuning for one job at a time takes beside the model; 0 and 0 if none recovers.

    Returns
    -------
    tuple
        What is held all the time: the copy of the dense weights, masks, what is trained, its gradients and moments. And
        what one batch takes: activations, logits, and the gradient of one parameter.
    """
    recovering = [job for job in jobs if job.recipe.recovers and job.calibration]
    if not recovering:
        return 0, 0
    sizes = [outputs * inputs for outputs, inputs in (anatomy.shape(*key) for key in anatomy)]
    copy = sum(sizes) * anatomy.element_size
    length = max(job.calibration.length for job in recovering if job.calibration)
    widest, blocks = max(anatomy.shape(*key)[0] for key in anatomy), len(anatomy.blocks)
    a_block = widest * 4 + anatomy.hidden_size * 10
    activations = anatomy.hidden_size * blocks + a_block if length > GRADIENT_TOKENS else a_block * blocks
    batch = max(GRADIENT_TOKENS, length) * (activations + anatomy.vocabulary * 4) * _FLOAT
    stored = max(parameter.numel() for parameter in anatomy.block_parameters().values()) * anatomy.element_size
    return copy + max(_held(anatomy, job) for job in recovering), batch + stored + max(sizes) * _FLOAT * 4


def _held(anatomy: Anatomy, job: Job) -> int:
    """Return the bytes of masks, parameters, gradients and two moments, and of weights that LoRA starts from."""
    shapes = covered_shapes(anatomy, job.recipe).values()
    weights = sum(outputs * inputs for outputs, inputs in shapes)
    rank = int(job.recipe.recovery_parameters.get("rank", 0))
    if not rank:
        return weights // 8 + int(weights * (1 - job.recipe.sparsity)) * _FLOAT * 4
    starts = weights * anatomy.element_size if job.recipe.updates else 0
    return weights // 8 + rank * sum(map(sum, shapes)) * _FLOAT * 4 + starts


class _InModel(Mapping[Key, Tensor]):
    """Values of a variant's kept weights, read from the model on access."""

    def __init__(self, anatomy: Anatomy, variant: Variant, keys: Sequence[Key]) -> None:
        self._anatomy = anatomy
        self._masks = variant.masks
        self._keys = dict.fromkeys(keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # Mapping's default would read the values

    def __getitem__(self, key: Key) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return kept_values(self._anatomy.weight(*key), self._masks[key].to(self._anatomy.device))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _trained(owner: DenseModel, variant: Variant, keys: Sequence[Key], sequences: Tensor, progress: Progress) -> str:
    """Fine-tune a model that has the weights of a variant, in place, and return what happened, in words."""
    recipe, calibration, anatomy = variant.record.recipe, variant.record.calibration, owner.anatomy
    assert recipe is not None
    assert calibration is not None
    settings = recipe.recovery_parameters
    steps, batch, rate = int(settings["steps"]), int(settings["batch"]), settings["rate"]
    masks = _Masks(variant, keys, anatomy.device)
    trained = _starts(owner, variant, keys, masks)
    adamw = torch.optim.AdamW(
        [parameter for one in trained.values() for parameter in one.parameters],
        lr=rate,
        weight_decay=settings["decay"],
        fused=anatomy.device.type == "cuda" or None,
    )
    before = _mean_loss(anatomy, sequences, progress)
    with _gradients_taken(anatomy, trained, masks) as parameters, _recomputing(anatomy, sequences.shape[1]):
        for step, rows in enumerate(_batches(len(sequences), steps, batch, calibration.seed)):
            for ids in _small(sequences[rows]):
                with torch.enable_grad():
                    advice = f"it was {before:.4g} at the start; lower rate, which is {rate:g}"
                    loss = checked_finite(token_loss(anatomy, ids), advice) * (len(ids) / batch)
                    torch.autograd.backward(loss, inputs=parameters)
                progress(ids.numel() * _passes(ids.shape[1]) * len(anatomy.blocks))
            _move(adamw, rate * (1 - step / steps))
            for key, one in trained.items():
                anatomy.set_weight(*key, one.weight(masks(key)))
    after = _mean_loss(anatomy, sequences, progress)
    return (
        f"fine-tuned on the calibration text for {steps} steps of {batch} × {sequences.shape[1]} tokens, "
        f"{steps * batch / len(sequences):.3g} times all of it: its mean loss per token was {before:.4f} before and "
        f"{after:.4f} after"
    )


class _Masks:
    """Masks on the model's device, eight weights per byte, unpacked one at a time."""

    def __init__(self, variant: Variant, keys: Sequence[Key], device: torch.device) -> None:
        self._bits = {key: torch.from_numpy(variant.masks.packed(key)).to(device) for key in keys}
        self._inputs = {key: variant.masks.shape(key)[1] for key in keys}

    def __call__(self, key: Key) -> Tensor:
        return unpack_bits(self._bits[key], self._inputs[key])


def _starts(owner: DenseModel, variant: Variant, keys: Sequence[Key], masks: _Masks) -> dict[Key, Trained]:
    """Return what is trained of every projection, given a model that has the variant's weights."""
    recipe, calibration = variant.record.recipe, variant.record.calibration
    assert recipe is not None
    assert calibration is not None
    recovery = recovery_named(recipe.recover)
    assert recovery.start is not None
    own = {name: recipe.recovery_parameters[name] for name in recovery.own}
    trained = {}
    for key in keys:
        # Removed weights do not matter, so the copy of the dense weights serves where the others are dense.
        weight = owner.anatomy.weight(*key).clone() if key in variant.values else owner.dense[key]
        seed = (calibration.seed << 32) + projection_seed(key)
        trained[key] = recovery.start(weight, masks(key), seed, **own)
    return trained


@contextmanager
def _gradients_taken(anatomy: Anatomy, trained: Mapping[Key, Trained], masks: _Masks) -> Iterator[list[nn.Parameter]]:
    """Context manager in which the gradients of stored parameters are handed to what is trained, and freed.

    Yields the parameters of the model.
    """
    stored = anatomy.stored_together(trained)
    parameters = {name: anatomy.model.get_parameter(name) for name in stored}

    def take(name: str, keys: Sequence[Key], parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        for key, part in anatomy.by_projection({name: gradient}, keys).items():
            trained[key].take(part, masks(key))

    with differentiable(parameters), ExitStack() as hooks:
        for name, keys in stored.items():
            hook = parameters[name].register_post_accumulate_grad_hook(partial(take, name, keys))
            hooks.callback(hook.remove)
        yield list(parameters.values())


@contextmanager
def _recomputing(anatomy: Anatomy, length: int) -> Iterator[None]:
    """Context manager in which only the inputs of blocks are kept for the backward pass, if sequences are long."""
    forwards: dict[nn.Module, Callable[..., object] | None] = {}
    try:
        for block in anatomy.blocks if length > GRADIENT_TOKENS else ():
            forwards[block] = vars(block).get("forward")
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, forward in forwards.items():
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _batches(sequences: int, steps: int, batch: int, seed: int) -> Sequence[Tensor]:
    """Return the sequences of each step: one random order of all of them after the other."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * batch // sequences)
    order = torch.cat([torch.randperm(sequences, generator=generator) for _ in range(passes)])
    return order[: steps * batch].split(batch)


def _small(sequences: Tensor) -> Sequence[Tensor]:
    """Split sequences so that few logits are held at a time."""
    return sequences.split(max(1, GRADIENT_TOKENS // sequences.shape[1]))


def _move(adamw: torch.optim.Optimizer, rate: float) -> None:
    """Take one step with the gradients that were added up, and drop them."""
    (group,) = adamw.param_groups
    torch.nn.utils.clip_grad_norm_(group["params"], _LONGEST)
    group["lr"] = rate
    adamw.step()
    adamw.zero_grad()


@torch.no_grad()
def _mean_loss(anatomy: Anatomy, sequences: Tensor, progress: Progress) -> float:
    losses = []
    for ids in _small(sequences):
        losses.append(token_loss(anatomy, ids) * len(ids))
        progress(ids.numel() * len(anatomy.blocks))
    return float(checked_finite(torch.stack(losses).sum())) / len(sequences)
