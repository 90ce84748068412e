"""A model that differs a little from itself, for what holds of small differences."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch

from probes.patching import DamagedModel
from pruning.variants.owner import DenseModel


class Disturbed(DamagedModel):
    """A model whose weights have all changed by a small share, another one for each; its biases have not."""

    biases = ()

    def __init__(self, model, share):
        self._owner = DenseModel(model)
        self.share = share

    def change(self, key):
        before = self._owner.dense[key]
        noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(key[0]), dtype=before.dtype)
        return -before * self.share * noise

    def _write(self, key, *, dense):
        before = self._owner.dense[key]
        self._owner.anatomy.set_weight(*key, before if dense else before - self.change(key))

    def differentiable_biases(self):
        return nullcontext()

    @contextmanager
    def damaged(self):
        with self.with_weights(list(self._owner.dense), dense=False):
            yield
