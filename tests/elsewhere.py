"""A second device for machines that have none: tensors that are elsewhere, and say so.

Inside `elsewhere()`, tensors of DEVICE are computed on the CPU but may not meet the CPU's: as on a
GPU, two devices in one operation, the CPU's generator, or `numpy()` are errors.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

COPIES = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_")
INDEXING = ("aten::index", "aten::_index_put", "aten::_unsafe_index")
PARSERS = (torch.device, torch._C._nn._parse_to)
CPU = torch.device("cpu")


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return False

    def has_primary_context(self, index):
        return False

    def is_built(self):
        return True


backend_registration._setup_privateuseone_for_python_backend("elsewhere", hook=_Hook())
DEVICE = torch.device("elsewhere", 0)


@contextlib.contextmanager
def elsewhere():
    """Let DEVICE be used as a GPU would be."""
    with _Factories(), _Calls():
        yield DEVICE


class Elsewhere(torch.Tensor):
    """A tensor of DEVICE, which holds one of the CPU."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
            dispatch_device=True,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return DEVICE
        kwargs = kwargs or {}
        _check(func._schema.name, tree_flatten((args, kwargs))[0])
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func._schema.name.endswith("_"):
            return args[0]
        to = kwargs.get("device")
        return out if to and not _is_device(to) else tree_map(_wrapped, out)

    def __repr__(self):
        return f"Elsewhere({self.held!r})"


class _Calls(TorchFunctionMode):
    """Reads DEVICE in calls of torch's functions, which would look for its kernels."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].held.tolist()
        leaves, spec = tree_flatten((args, kwargs))
        if func in PARSERS or not any(map(_is_device, leaves)):
            return func(*args, **kwargs)
        if args and isinstance(args[0], Elsewhere):  # it is there already
            args, kwargs = tree_unflatten([None if _is_device(x) else x for x in leaves], spec)
            return func(*args, **kwargs)
        _check(str(func), [leaf for leaf in leaves if isinstance(leaf, torch.Generator)])
        args, kwargs = tree_unflatten([CPU if _is_device(x) else x for x in leaves], spec)
        return _Move.apply(func(*args, **kwargs))


class _Factories(TorchDispatchMode):
    """Makes there what torch itself makes on the way."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves, spec = tree_flatten((args, kwargs or {}))
        if any(isinstance(x, Elsewhere) for x in leaves) or not any(map(_is_device, leaves)):
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_unflatten([CPU if _is_device(x) else x for x in leaves], spec)
        return Elsewhere(func(*args, **kwargs))


class _Move(torch.autograd.Function):
    """Copies a tensor there, and its gradient back."""

    @staticmethod
    def forward(ctx, x):
        return Elsewhere(x.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return _held(gradient)


def _check(name, leaves):
    here = [x for x in leaves if type(x) is torch.Tensor or type(x) is torch.nn.Parameter]
    here = [tuple(x.shape) for x in here if x.ndim]
    if here and not name.startswith((*COPIES, *INDEXING)):
        raise RuntimeError(f"{name}: tensors on two devices; on the CPU: {here}")
    if any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{name}: the CPU's generator for a tensor of {DEVICE}")


def _held(x):
    if _is_device(x):
        return CPU
    return x.held if isinstance(x, Elsewhere) else x


def _wrapped(x):
    return Elsewhere(x) if type(x) is torch.Tensor else x


def _is_device(x):
    if isinstance(x, str):
        return x.split(":")[0] == DEVICE.type
    return isinstance(x, torch.device) and x.type == DEVICE.type
