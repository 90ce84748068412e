"""The owner of a loaded model's dense weights, which turns the model into a variant and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.anatomy import Anatomy, Stack
from ..projections import Key
from .biases import biased
from .others import reaching, replaced
from .variant import Variant


class DenseModel:
    """A dense model that is turned into its variants in place, one block at a time or as a whole.

    All code that needs a variant of a loaded model uses this object. There is one per model, so there is at most one
    copy of the dense weights.

    Parameters
    ----------
    model
        The dense model, in memory or streamed from its checkpoint.

    Attributes
    ----------
    model, anatomy
        The model and its parts.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.anatomy = Anatomy(model)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the dense model; see :meth:`pruning.Anatomy.fingerprint`."""
        return self.anatomy.fingerprint()

    def check(self, variant: Variant) -> None:
        """Raise ``VariantError`` unless a variant was made from this model."""
        variant.check_belongs_to(self.fingerprint)

    # -- block by block --------------------------------------------------------------------------------------

    @contextmanager
    def block(self, layer: int, *, changes: bool) -> Iterator[Block]:
        """Context manager that loads one block's weights.

        Parameters
        ----------
        layer
            Index of the block.
        changes
            Whether the block will be turned into that of variants. Its dense projections are then copied, 2 bytes per
            weight in bfloat16 (0.4 GB for a block of Llama-3-8B), and written back at the end.
        """
        with self.anatomy.loaded(layer, to_read=not changes):
            block = Block(self.anatomy, layer, changes=changes)
            try:
                yield block
            finally:
                block.restore()

    def beside(self, variant: Variant, names: Collection[str]) -> AbstractContextManager[None]:
        """Context manager in which parameters outside the blocks, which must be loaded, are those of a variant."""
        return replaced(self.anatomy, variant.others, names)

    def starts_alike(self, variant: Variant, stack: Stack) -> bool:
        """Whether a variant has the dense model's embeddings, and all else that precedes a stack's first block."""
        return not reaching(self.anatomy, variant.others, self.names_at_start(stack))

    def names_at_start(self, stack: Stack) -> list[str]:
        """Return the paths of all that decides what reaches the blocks of a stack: also of tables in its first block.

        T5's first block has the position biases of all.
        """
        return [*self.anatomy.names_for_start(), *self.anatomy.parameter_names(stack.first)]

    # -- the whole model -------------------------------------------------------------------------------------

    @cached_property
    def dense(self) -> Mapping[Key, Tensor]:
        """Every projection's dense weight, copied once, on first access.

        The copy is on the model's device if it takes less than 80 % of the free memory there, otherwise on the host.

        Raises
        ------
        ModelError
            If the model's weights stay on disk.
        """
        if self.anatomy.streamed:
            raise ModelError("this needs the whole model in memory, but it is streamed from disk; load it whole")
        place = self._place_for_copy()
        return {key: self.anatomy.weight(*key).to(place, copy=True) for key in self.anatomy}

    @contextmanager
    def pruned_to(self, variant: Variant) -> Iterator[None]:
        """Context manager that turns the whole model into a variant, and restores the dense model bit for bit.

        Raises
        ------
        VariantError
            If the variant was not made from this model.
        """
        self.check(variant)
        dense = self.dense
        try:
            for key in variant.projections:
                write_weight(self.anatomy, key, variant, dense[key])
            with biased(self.anatomy, variant.biases), replaced(self.anatomy, variant.others):
                yield
        finally:
            for key in variant.projections:
                self.anatomy.set_weight(*key, dense[key])

    def _place_for_copy(self) -> torch.device:
        device = self.anatomy.device
        if device.type != "cuda":
            return device
        needed = sum(out * inputs for out, inputs in map(self._shape, self.anatomy)) * self.anatomy.element_size
        free, _ = torch.cuda.mem_get_info(device)
        return device if needed < 0.8 * free else torch.device("cpu")

    def _shape(self, key: Key) -> tuple[int, int]:
        return self.anatomy.shape(*key)


class Block:
    """One block of a dense model whose weights are loaded.

    Parameters
    ----------
    anatomy, layer
        The block.
    changes
        Whether it may be turned into that of a variant.
    """

    def __init__(self, anatomy: Anatomy, layer: int, *, changes: bool) -> None:
        self._anatomy = anatomy
        self._layer = layer
        self._changed: set[str] = set()
        self._beside = ExitStack()
        roles = anatomy.roles(layer) if changes else ()
        self._dense = {role: anatomy.weight(layer, role).clone() for role in roles}

    def become(self, variant: Variant) -> None:
        """Turn the block into that of a variant, whatever its current state."""
        changed = {role for role in self._dense if variant.changes((self._layer, role))}
        for role in self._changed - changed:
            self._anatomy.set_weight(self._layer, role, self._dense[role])
        for role in changed:
            write_weight(self._anatomy, (self._layer, role), variant, self._dense[role])
        self._changed = changed
        self._beside.close()
        own = {key: bias for key, bias in variant.biases.items() if key[0] == self._layer}
        self._beside.enter_context(biased(self._anatomy, own))
        self._beside.enter_context(replaced(self._anatomy, variant.others, self._anatomy.parameter_names(self._layer)))

    def restore(self) -> None:
        """Restore the dense block bit for bit."""
        for role in self._changed:
            self._anatomy.set_weight(self._layer, role, self._dense[role])
        self._changed = set()
        self._beside.close()


@torch.no_grad()
def write_weight(anatomy: Anatomy, key: Key, variant: Variant, dense: Tensor) -> None:
    """Write a variant's weight of one projection into the model, given the dense weight, without a copy if possible."""
    present = anatomy.weight(*key)
    if anatomy.is_view(*key):
        variant.write(key, dense, present)
        return
    made = torch.empty_like(present)  # rows of several roles are interleaved: `present` is a copy
    variant.write(key, dense, made)
    anatomy.set_weight(*key, made)
