"""A device that nobody may wait for: torch's `meta`, whose tensors have no values, so that whoever
reads one fails, and modes that refuse what a GPU's host would wait for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
COPIES = ("copy_", "_to_copy", "to")
READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")


class Waits(AssertionError):
    pass


class RefuseWaits(TorchDispatchMode):
    """Raises Waits for what a GPU's host would wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        named = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        if name in COPIES:
            came = named["src" if name == "copy_" else "self"].device
            to = named["self"].device if name == "copy_" else named.get("device") or came
            if came != to and not named.get("non_blocking"):
                raise Waits(f"{name} from {came} to {to} is waited for")
        else:
            self._look(name, tree_leaves(named))
        return func(*args, **kwargs)

    def _look(self, name, leaves):
        # Numbers without dimensions go along with a kernel's arguments.
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        where = {tensor.device for tensor in tensors if tensor.dim() or tensor.device == DEVICE}
        if DEVICE in where and name in READS:
            raise Waits(f"{name} reads what the device computes")
        if len(where) > 1:
            raise Waits(f"{name} copies one of its tensors from or to the device and waits for it")


class RefuseLists(TorchFunctionMode):
    """Raises Waits for numbers of Python's that become a tensor on the device: torch copies them
    there, and waits, where RefuseWaits does not see it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        makes = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if makes and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            raise Waits("a list becomes a tensor on the device")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if args[0].device == DEVICE and any(isinstance(part, list) for part in index):
                raise Waits("a list is an index of what the device has")
        return func(*args, **kwargs)


@contextmanager
def refused_waits() -> Iterator[None]:
    """Whoever waits for the device within raises Waits."""
    with torch.inference_mode(), RefuseWaits(), RefuseLists():
        yield
