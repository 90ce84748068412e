"""A device that is not there: tensors that say they are on it, are computed on the CPU, and refuse to be mixed with it.

It takes the place of a GPU in tests of placement. Operations raise where a GPU's would, and the values are right. What
makes a GPU wait for the host (:attr:`StandIn.syncs`) is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"


class _Hook(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc]
    """Keeps the device from those who look for an accelerator."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, number: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


# Without it, torch has no guard for the device and cannot index its tensors.
_setup_privateuseone_for_python_backend(NAME, hook=_Hook())
# Gradient checkpointing asks whatever accelerator there is, even where nothing is on it.
getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
DEVICE = torch.device(NAME, 0)

_AT = torch.ops.aten
#: Whose arguments may be on several devices, as with a real one.
_INDEXING = {_AT.index.Tensor, _AT.index_put.default, _AT.index_put_.default}
_MIXING = {_AT.copy_.default, _AT._to_copy.default, *_INDEXING}
#: What hands a value, or a shape that depends on values, to the host.
_SYNCS = {
    _AT._local_scalar_dense.default,
    _AT.nonzero.default,
    _AT.equal.default,
    _AT.masked_select.default,
    _AT.bincount.default,
    _AT.repeat_interleave.Tensor,
}
_WATCHED = _MIXING | _SYNCS


class OnStandIn(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnStandIn:
        """Put a CPU tensor there."""
        tensor: OnStandIn = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Show the values."""
        return f"OnStandIn({self.inner!r})"

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as a tensor on a GPU does."""
        if force:
            return self.cpu().numpy()
        raise TypeError(f"can't convert {NAME} device type tensor to numpy; use Tensor.cpu() first")

    def tolist(self) -> Any:
        """Return the values; the host waits for them."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation outside of the mode."""
        return _run(func, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """Inside, ``device="standin"`` can be asked for.

    Attributes
    ----------
    syncs
        How often each operation made the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()

    def __enter__(self) -> StandIn:
        """Enter; :func:`torch.tensor`, too, asks the mode."""
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave."""
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it if it makes the host wait."""
        kwargs = kwargs or {}
        if func in _WATCHED:
            tensors = list(_tensors((args, kwargs)))
            placed = [isinstance(tensor, OnStandIn) for tensor in tensors]
            to_host = func is _AT._to_copy.default and placed == [True] and _wanted(kwargs) not in (None, NAME)
            crossing = func is _AT.copy_.default and any(placed) and not all(placed)
            masked = func in _INDEXING and any(placed) and any(tensor.dtype == torch.bool for tensor in tensors[1:])
            if to_host or crossing or masked or (func in _SYNCS and any(placed)):
                self.syncs[func.name()] += 1
        return _run(func, args, kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on what is inside of tensors, and put what it returns where it belongs."""
    tensors = list(_tensors((args, kwargs)))
    placed = any(isinstance(tensor, OnStandIn) for tensor in tensors)
    if placed and func not in _MIXING:
        stray = [t for t in tensors if not isinstance(t, OnStandIn) and t.ndim > 0]
        if stray:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in stray)
            raise RuntimeError(f"{func.name()}: tensors on {NAME}, but also on the CPU: {shapes}")
    there = isinstance(tensors[0], OnStandIn) if func in _MIXING else placed
    if placed and not there and func in _INDEXING:
        raise RuntimeError(f"{func.name()}: a tensor on the CPU is indexed by one on {NAME}")
    wanted = _wanted(kwargs)
    if wanted is not None:
        there = wanted == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*_mapped(OnStandIn, _inside, args), **_mapped(OnStandIn, _inside, kwargs))
    if not there:
        return result
    result = _mapped(Tensor, OnStandIn, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if placed and _aliases(func) else result


def _wanted(kwargs: Any) -> str | None:
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type


def _inside(tensor: OnStandIn) -> Tensor:
    return tensor.inner


@cache
def _aliases(func: Any) -> bool:
    """Whether an operation returns one of its arguments, or a view of it."""
    return any(returned.alias_info is not None for returned in func._schema.returns)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _mapped(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple | list):  # torch's named ones are made like the plain ones
        return type(value)([_mapped(kind, change, part) for part in value])
    if isinstance(value, dict):
        return {name: _mapped(kind, change, part) for name, part in value.items()}
    return value


def on_standin(model: Any) -> Any:
    """Move a model there, in place."""
    with torch.no_grad():
        return model.to(DEVICE)
