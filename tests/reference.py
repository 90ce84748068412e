"""The tiny models in float64: what every projection reads and how the loss depends on it, by plain means."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import naive
import torch
from conftest import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from pruning import Anatomy, CalibrationSet, Recipe
from pruning.engine import Job
from pruning.engine.streams import decoder_labels, encoder_ids
from pruning.text.calibration import CalibrationText, Piece

CALIBRATION = CalibrationSet(name="en+sw", languages=("en", "sw"), samples=6, length=16)
Inputs = dict[tuple[int, str], dict[str, torch.Tensor]]


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (6, 16), generator=torch.Generator().manual_seed(7))
    return {"en": ids[:3], "sw": ids[3:]}


def text() -> CalibrationText:
    pieces = {Piece(language, 16, 0, 3): ids for language, ids in tokens().items()}
    return CalibrationText(pieces, {CALIBRATION: list(pieces)})


def job(recipe: Recipe) -> Job:
    return Job(recipe, CALIBRATION if recipe.calibrated else None)


def run_model(anatomy: Anatomy, ids: torch.Tensor, **more: Any) -> Any:
    model: Any = anatomy.model
    if anatomy.encoder_decoder:
        return model(input_ids=encoder_ids(ids), labels=decoder_labels(ids), use_cache=False)
    return model(input_ids=ids, use_cache=False, **more)


def catch_inputs(anatomy: Anatomy) -> Inputs:
    """Return what each projection reads, by language, caught by plain hooks in whole forward passes of batches of one."""
    caught: dict[tuple[int, str], dict[str, list[torch.Tensor]]] = {key: {} for key in anatomy}
    language = ""

    def keep(layer: int, role: str, rows: torch.Tensor) -> None:
        caught[layer, role].setdefault(language, []).append(rows.reshape(-1, rows.shape[-1]))

    def plain(module: Any, args: Any, layer: int, roles: tuple[str, ...]) -> None:
        for role in roles:
            keep(layer, role, args[0])

    def experts(module: Any, args: Any, layer: int) -> None:
        hidden, index = args[0].flatten(0, -2), args[1]
        for expert in range(module.down_proj.shape[0]):
            rows = hidden[(index == expert).any(dim=-1)]
            gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            keep(layer, f"gate.{expert}", rows)
            keep(layer, f"up.{expert}", rows)
            keep(layer, f"down.{expert}", module.act_fn(gate) * up)

    handles = []
    for layer in range(len(anatomy.blocks)):
        for group in anatomy.groups(layer):
            module = anatomy.module(layer, group.module)
            if group.expert is None:
                handles.append(module.register_forward_pre_hook(partial(plain, layer=layer, roles=group.roles)))
        if anatomy.experts(layer) is not None:
            handles.append(anatomy.experts(layer).register_forward_pre_hook(partial(experts, layer=layer)))
    with torch.no_grad():
        for language, ids in tokens().items():  # noqa: B007  (read by the hooks)
            for row in ids:
                run_model(anatomy, row[None])
    for handle in handles:
        handle.remove()
    return {key: {lang: torch.cat(rows) for lang, rows in by.items()} for key, by in caught.items()}


def double_model(kind: str) -> Any:
    model = tiny_model(kind).double()
    model.config._experts_implementation = "eager"  # the grouped product has no float64
    return model


@cache
def double(kind: str) -> tuple[Anatomy, Inputs]:
    anatomy = Anatomy(double_model(kind))
    return anatomy, catch_inputs(anatomy)


@cache
def derivatives(kind: str) -> tuple[dict[tuple[int, str], torch.Tensor], dict[tuple[int, str], torch.Tensor]]:
    anatomy, _ = double(kind)
    parameters = anatomy.block_parameters()

    def loss() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for ids in tokens().values():
            for row in ids:
                if anatomy.encoder_decoder:
                    total = total + run_model(anatomy, row[None]).loss / 6
                else:
                    logits = run_model(anatomy, row[None]).logits[0, :-1]
                    total = total + torch.nn.functional.cross_entropy(logits, row[1:]) / 6
        return total

    with sdpa_kernel(SDPBackend.MATH):
        g, h = naive.gradients(loss, list(parameters.values()))
    split = [anatomy.by_projection(dict(zip(parameters, part, strict=True))) for part in (g, h)]
    return split[0], split[1]
