"""Run a graph and record on each node what it returned: shapes, sizes, parameter values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.names import LAYOUT_QUERIES, SIZE_QUERIES
from prifu_plugin.prune.seen import Seen, note, seen, was_seen


class _Recorder(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        shape = _shape(result)
        nested = not shape and _holds_tensors(result)
        example = result.new_empty(0) if isinstance(result, Tensor) else result
        known = Seen(
            shape=shape,
            several=_is_several(result),
            nested=nested,
            zero_dim=isinstance(result, Tensor) and result.ndim == 0,
            example=None if nested else example,
            static=result if shape and _follows_from_parameters(n) else None,
            varies=was_seen(n) and seen(n).varies,
            moves=not shape and not nested and (_tells_values(n) or _given_what_moves(n)),
        )
        if known.is_static and _given_what_moves(n):
            known = replace(known, static=None, varies=True)
        note(n, known)
        return result


class _SecondRecorder(fx.Interpreter):
    """Note the same at other sizes; what follows from parameters and sizes is not static."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        example = result if not isinstance(result, Tensor) else None
        known = replace(seen(n), other_shape=_shape(result), other_example=example)
        if not known.shape and not known.nested:
            differs = _is_plain(example) and known.example != example
            known = replace(known, moves=known.moves or differs or _follows_from_what_moves(n))
        varies = _given_what_moves(n) or any(seen(i).varies for i in n.all_input_nodes)
        if known.is_static and (varies or not _same(known.static, result)):
            known = replace(known, static=None, varies=True)
        note(n, known)
        return result


def record_examples(
    root: nn.Module,
    graph: fx.Graph,
    inputs: Sequence[Tensor],
    others: Sequence[Tensor] | None = None,
) -> None:
    """Run a graph and note what is `seen` of its nodes.

    Args:
        root: the model in eval mode.
        graph: a graph on it.
        inputs: example inputs, in the order of the graph's placeholders.
        others: inputs of another batch size, and of another size if the model takes one; what
            they give is noted as `other_shape` and `other_example`.
    """
    with torch.no_grad():
        with undisturbed(root):
            _Recorder(root, graph).run(*inputs)
        if others is None:
            return
        with undisturbed(root):
            _SecondRecorder(root, graph).run(*others)


def _follows_from_parameters(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    tensors = [source for source in node.all_input_nodes if seen(source).shape]
    return node.op.startswith("call_") and bool(tensors) and all(seen(s).is_static for s in tensors)


def _tells_values(node: fx.Node) -> bool:
    """Whether a node asks a tensor for its values, rather than its size: item, tolist."""
    attribute = node.args[1] if node.target is getattr else node.target
    asked = [source for source in node.all_input_nodes if seen(source).shape]
    return bool(asked) and attribute not in _KNOWN and not all(seen(s).is_static for s in asked)


_KNOWN = SIZE_QUERIES | LAYOUT_QUERIES


def _given_what_moves(node: fx.Node) -> bool:
    return any(seen(source).moves for source in node.all_input_nodes)


def _follows_from_what_moves(node: fx.Node) -> bool:
    """Whether a number is made of numbers that move; one of the sizes of a shape is its own."""
    shapes = [seen(i) for i in node.all_input_nodes if isinstance(seen(i).example, torch.Size)]
    return not shapes and _given_what_moves(node)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, or a tuple or list of some."""
    items = value if isinstance(value, tuple | list) else (value,)
    return all(isinstance(item, bool | int | float) for item in items)


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
