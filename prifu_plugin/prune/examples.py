"""Run a graph once and record on each node what it returned: shapes, sizes, parameter values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn


class _Recorder(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        several = (
            isinstance(result, tuple | list)
            and bool(result)
            and all(isinstance(r, Tensor) for r in result)
        )
        if several:
            n.meta["shape"] = [tuple(r.shape) for r in result]
        elif isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape) or (1,)
        else:
            n.meta["shape"] = ()
        n.meta["several"] = several
        if isinstance(result, Tensor) and result.ndim == 0:
            n.meta["zero_dim"] = True
        n.meta["example"] = result if not isinstance(result, Tensor) else result.new_empty(0)
        if n.op == "get_attr" and (several or isinstance(result, Tensor)):
            n.meta["static"] = result
        elif n.op in ("call_function", "call_method", "call_module") and n.meta["shape"]:
            tensors = [i for i in n.all_input_nodes if i.meta["shape"]]
            if tensors and all("static" in i.meta for i in tensors):
                n.meta["static"] = result
        return result


def record_examples(root: nn.Module, graph: fx.Graph, inputs: Sequence[Tensor]) -> None:
    """Run a graph on inputs and record "shape", "several", "example" and "static" on its nodes.

    Args:
        root: the model in eval mode.
        graph: a graph on it.
        inputs: example inputs, in the order of the graph's placeholders.
    """
    defaults = [None] * (sum(n.op == "placeholder" for n in graph.nodes) - len(inputs))
    with torch.no_grad():
        _Recorder(root, graph).run(*inputs, *defaults)
