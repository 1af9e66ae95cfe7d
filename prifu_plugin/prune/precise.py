"""The model in fp64, with the masks it has: where facts are found and mistakes show."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from prifu_plugin.graph.capture import CONSTANT, Captured
from prifu_plugin.graph.insert import filters
from prifu_plugin.graph.state import copied

_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = {"float": "double", "half": "double", "bfloat16": "double"}


def precise(captured: Captured) -> Captured:
    """Copy a captured model to fp64; casts to a lower precision in its graph become fp64 too.

    Args:
        captured: a lowered graph and its model; neither is changed.

    Returns:
        The same graph, node by node, on the copy.
    """
    root = in_fp64(captured.root)
    for name, value in captured.computed.items():
        if name.startswith(CONSTANT):
            setattr(root, name, value)
        else:
            root.get_parameter(name).data = value
    return Captured(root, _promoted(captured.graph))


def in_fp64(model: nn.Module) -> nn.Module:
    """Copy a model with filters to fp64, with the masks it has."""
    root = copied(model).double()
    for module in root.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, name, value.double())
    units = zip(filters(model).values(), filters(root).values(), strict=True)
    for unit, twin in units:
        # An open weight is above 0, so alpha = 0 keeps it open whatever rounding says.
        twin.weight.data.masked_fill_(unit.closed, 0.0)
        twin.alpha = 0.0
    return root


def _promoted(graph: fx.Graph) -> fx.Graph:
    if not any(_casts(node) for node in graph.nodes):
        return graph
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        if node.op == "call_method":
            node.target = _CASTS.get(str(node.target), node.target)
        node.args = _raised(node.args)
        node.kwargs = _raised(node.kwargs)
    return graph


def _casts(node: fx.Node) -> bool:
    return (
        (node.op == "call_method" and node.target in _CASTS)
        or _raised(node.args) != node.args
        or _raised(node.kwargs) != node.kwargs
    )


def _raised(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_raised, value)) if type(value) in (tuple, list) else value
    if isinstance(value, dict):
        return {key: _raised(item) for key, item in value.items()}
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value


class _Raised(TorchFunctionMode):
    """Let nothing ask for less than fp64: neither casts nor tensors that a forward makes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _CASTS and isinstance(args[0], Tensor):
            longer = args[0].double()
            return longer.clone() if longer is args[0] and name != "float" else longer
        given = kwargs or {}
        if any(isinstance(value, torch.dtype) for value in (*args, *given.values())):
            args, given = _raised(args), _raised(given)
        return func(*args, **given)


@contextmanager
def raised() -> Iterator[None]:
    """Run a model in fp64 throughout, in a with block: its own casts and tensors too.

    Example:
        >>> with raised():
        ...     (torch.zeros(2).float() + 1).dtype
        torch.float64
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Raised():
            yield
    finally:
        torch.set_default_dtype(default)


class LowestPrecision(TorchDispatchMode):
    """Note whether anything is computed below fp64, as layers do that cast inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lower = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at its result."""
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        self.lower |= any(isinstance(r, Tensor) and r.dtype in _LOWER for r in results)
        return result
