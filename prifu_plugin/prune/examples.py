"""Run a graph and record on each node what it returned: shapes, sizes, parameter values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prifu_plugin.graph.undisturbed import undisturbed


class _Recorder(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["several"] = _is_several(result)
        n.meta["shape"] = _shape(result)
        n.meta["nested"] = not n.meta["shape"] and _holds_tensors(result)
        if isinstance(result, Tensor) and result.ndim == 0:
            n.meta["zero_dim"] = True
        n.meta["example"] = result if not isinstance(result, Tensor) else result.new_empty(0)
        if n.meta["nested"]:
            n.meta["example"] = None
        if n.op == "get_attr" and n.meta["shape"]:
            n.meta["static"] = result
        elif n.op in ("call_function", "call_method", "call_module") and n.meta["shape"]:
            tensors = [i for i in n.all_input_nodes if i.meta["shape"]]
            if tensors and all("static" in i.meta for i in tensors):
                n.meta["static"] = result
        return result


class _SecondRecorder(fx.Interpreter):
    """Note the same at other sizes; what follows from parameters and sizes is not static."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        example = result if not isinstance(result, Tensor) else None
        n.meta["other"] = (_shape(result), example)
        moves = any("varies" in i.meta for i in n.all_input_nodes)
        if "static" in n.meta and (moves or not _same(n.meta["static"], result)):
            del n.meta["static"]
            n.meta["varies"] = True
        return result


def record_examples(
    root: nn.Module,
    graph: fx.Graph,
    inputs: Sequence[Tensor],
    others: Sequence[Tensor] | None = None,
) -> None:
    """Run a graph and record "shape", "several", "example" and "static" on its nodes.

    Args:
        root: the model in eval mode.
        graph: a graph on it.
        inputs: example inputs, in the order of the graph's placeholders.
        others: inputs of another batch size, and of another size if the model takes one; what
            they give is recorded as "other".
    """
    with torch.no_grad():
        with undisturbed(root):
            _Recorder(root, graph).run(*inputs)
        if others is None:
            return
        with undisturbed(root):
            _SecondRecorder(root, graph).run(*others)


def _is_several(result: Any) -> bool:
    listed = isinstance(result, tuple | list) and bool(result)
    return listed and all(isinstance(r, Tensor) for r in result)


def _holds_tensors(result: Any) -> bool:
    """Whether a result is a structure with tensors in it, as (output, None) of attention is."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))


def _shape(result: Any) -> Any:
    """Return the shape of a tensor, shapes of a tuple of tensors, () for anything else."""
    if _is_several(result):
        return [tuple(r.shape) for r in result]
    return (tuple(result.shape) or (1,)) if isinstance(result, Tensor) else ()


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(_same(a, b) for a, b in pairs)
