"""Capture a model's graph with torch.fx, without breaking its normalization layers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import CaptureError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.host import is_host
from prifu_plugin.graph.norms import norm_spec


@dataclass(frozen=True)
class Captured:
    """A graph and the module its targets refer to."""

    root: nn.Module
    graph: fx.Graph


class ModelTracer(fx.Tracer):
    """Trace through containers, stop at layers.

    Leaves are the modules of torch.nn, what timm registers as opaque, normalization layers
    (traced through, a BatchNorm would lose its count of batches) and filters.
    """

    def __init__(self) -> None:
        modules, functions = _timm_leaves()
        self._opaque = tuple(modules)
        super().__init__(autowrap_functions=tuple(functions))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph keeps this module as one call."""
        if isinstance(m, PriFU | CutFilter) or norm_spec(m) is not None:
            return True
        if is_host(m):
            return False
        if isinstance(m, (*self._opaque, *_LAYERS)):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def capture(model: nn.Module) -> Captured:
    """Trace a model in the mode it is in (train or eval).

    Arguments of forward that have defaults keep them, so that "x is None" is decided now.

    Args:
        model: any module; it is not changed.

    Returns:
        The graph, with targets that are paths in `model`.

    Raises:
        CaptureError: if its Python code decides on values of tensors.

    Example:
        >>> [n.name for n in capture(nn.Sequential(nn.Linear(2, 2))).graph.nodes]
        ['input_1', '_0', 'output']
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    try:
        graph = ModelTracer().trace(model, concrete_args=defaults or None)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be traced: {error}. Its forward branches on the value "
            "of a tensor, or uses an operation torch.fx does not know."
        ) from error
    return Captured(model, graph)


def calls(captured: Captured) -> set[str]:
    """Return the paths of the modules that a graph calls."""
    return {str(node.target) for node in captured.graph.nodes if node.op == "call_module"}


# Subclasses elsewhere than in torch.nn are layers too (weight standardization, same padding).
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _timm_leaves() -> tuple[list[type[nn.Module]], list[Callable[..., Any]]]:
    """Return timm's registry of opaque modules and functions, if timm is in use."""
    layers = sys.modules.get("timm.layers")
    if layers is None:
        return [], []
    return list(layers.get_notrace_modules()), list(layers.get_notrace_functions())
