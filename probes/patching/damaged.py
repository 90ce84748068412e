"""A dense model that turns into a pruned variant and back, as a whole or projection by projection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from pruning.projections import Key
from pruning.variants.biases import biased
from pruning.variants.owner import DenseModel, write_weight
from pruning.variants.variant import Variant


class DamagedModel:
    """A dense model that can be switched quickly to a pruned variant and back.

    Parameters
    ----------
    owner
        Owner of the dense model (``session.owner``), which must be in memory.
    variant
        A variant of that model.

    Raises
    ------
    VariantError
        If the variant was made from another model.
    """

    def __init__(self, owner: DenseModel, variant: Variant) -> None:
        owner.check(variant)
        self._owner = owner
        self._variant = variant
        present = {key: owner.anatomy.bias(*key) for key in variant.biases}
        self._dense_biases = {key: None if bias is None else bias.clone() for key, bias in present.items()}

    @property
    def projections(self) -> tuple[Key, ...]:
        """The projections that were pruned or quantized."""
        return self._variant.projections

    def numel(self, key: Key) -> int:
        """Return the number of weights of a projection."""
        return self._owner.dense[key].numel()

    def damaged(self) -> AbstractContextManager[None]:
        """Context manager within which the model is pruned."""
        return self._owner.pruned_to(self._variant)

    @property
    def biases(self) -> tuple[Key, ...]:
        """The projections whose biases differ from the dense model's."""
        return tuple(self._variant.biases)

    def differentiable_biases(self) -> AbstractContextManager[None]:
        """Context manager within which every projection whose bias differs has one, of zeros if it has none now."""
        anatomy = self._owner.anatomy
        lacking = {key: bias for key, bias in self._variant.biases.items() if anatomy.bias(*key) is None}
        return biased(anatomy, {key: torch.zeros_like(bias) for key, bias in lacking.items()})

    def bias_change(self, key: Key) -> Tensor:
        """Return a projection's dense bias minus its pruned bias, on the model's device; no bias is one of zeros."""
        pruned = self._variant.biases[key].to(self._owner.anatomy.device)
        dense = self._dense_biases[key]
        return -pruned if dense is None else dense - pruned

    def change(self, key: Key) -> Tensor:
        """Return a projection's dense weight minus its pruned weight, on the model's device."""
        dense = self._owner.dense[key].to(self._owner.anatomy.device)
        pruned = torch.empty_like(dense)
        self._variant.write(key, dense, pruned)
        return dense - pruned

    @contextmanager
    def with_weights(self, keys: Sequence[Key], *, dense: bool) -> Iterator[None]:
        """Context manager within which some projections have their dense, or their pruned, weights and biases."""
        try:
            for key in keys:
                self._write(key, dense=dense)
            yield
        finally:
            for key in keys:
                self._write(key, dense=not dense)

    def _write(self, key: Key, *, dense: bool) -> None:
        if dense:
            self._owner.anatomy.set_weight(*key, self._owner.dense[key])
        else:
            write_weight(self._owner.anatomy, key, self._variant, self._owner.dense[key])
        if key in self._variant.biases:
            bias = self._dense_biases[key] if dense else self._variant.biases[key]
            self._owner.anatomy.set_bias(*key, bias)
