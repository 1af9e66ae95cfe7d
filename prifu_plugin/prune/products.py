"""Products with a parameter become linear maps: x @ weight, mm, addmm, einsum."""

from __future__ import annotations

import math
import operator
import string
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from prifu_plugin.graph.capture import Captured
from prifu_plugin.prune.functional_layers import can_be_taken_over
from prifu_plugin.prune.seen import seen, was_seen

_MATMULS = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm", "__matmul__")
_ADDMMS = (torch.addmm, "addmm")


@dataclass(frozen=True)
class _Product:
    """A product of an input and a parameter, one letter a dimension, as einsum writes it.

    Attributes:
        x: the input and its letters.
        weight: the parameter and its letters.
        result: the letters of the result.
        bias: what is added, a vector, or None.
    """

    x: tuple[fx.Node, str]
    weight: tuple[fx.Node, str]
    result: str
    bias: fx.Node | None = None


def spell_out_products(captured: Captured) -> bool:
    """Write products with a parameter as F.linear; returns whether there were any.

    Those that sum over the last dimensions of the input and put those of the parameter in their
    place, whose parameter nothing else reads.

    Args:
        captured: with recorded examples, which tell what is a parameter.
    """
    root, graph = captured.root, captured.graph
    found = False
    for node in list(graph.nodes):
        product = _product(node)
        summed = None if product is None else _summed(product)
        if product is None or summed is None:
            continue
        if not can_be_taken_over(root, product.weight[0], node):
            continue
        with graph.inserting_before(node):
            result = _as_linear(graph, product, summed)
        for made in (result, *result.all_input_nodes):  # where its layer is put
            made.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack"))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        found = True
    return found


def _product(node: fx.Node) -> _Product | None:
    """Read a product of one input and one parameter, None if a node is something else."""
    if node.op not in ("call_function", "call_method") or node.kwargs:
        return None
    if node.target is torch.einsum:
        return _of_einsum(node)
    tensors = list(node.args)
    if node.target in _ADDMMS and len(tensors) == 3:
        bias, *pair = tensors
    elif node.target in _MATMULS and len(tensors) == 2:
        bias, pair = None, tensors
    else:
        return None
    shapes = [shape for shape in map(_shape, pair) if shape is not None]
    if len(shapes) != 2 or len(shapes[1]) > 2:
        return None
    rows = string.ascii_lowercase[: len(shapes[0])]
    columns = "Z" * (len(shapes[1]) - 1)
    return _with_roles(pair, (rows, rows[-1] + columns), rows[:-1] + columns, bias)


def _of_einsum(node: fx.Node) -> _Product | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    if "->" not in equation:
        once = [a for a in sorted(set(equation)) if a.isalpha() and equation.count(a) == 1]
        equation += "->" + "..." * ("..." in equation) + "".join(once)
    shapes = [shape for shape in map(_shape, operands) if shape is not None]
    if len(shapes) != 2:
        return None
    left, result = equation.replace(" ", "").split("->")
    terms = left.split(",")
    dots = [len(s) + 3 - len(t) if "..." in t else 0 for t, s in zip(terms, shapes, strict=True)]
    if min(dots) > 0:  # both have dimensions without a letter
        return None
    free = [letter for letter in string.ascii_letters if letter not in equation]
    letters = "".join(free[: max(dots)])
    one, other, result = (text.replace("...", letters) for text in (*terms, result))
    return _with_roles(operands, (one, other), result, None)


def _with_roles(pair: Any, terms: tuple[str, str], result: str, bias: Any) -> _Product | None:
    """Tell the input from the parameter."""
    static = [seen(one).is_static for one in pair]
    if static == [True, False]:
        pair, terms = pair[::-1], terms[::-1]
    elif static != [False, True]:
        return None
    if bias is not None:
        shape = _shape(bias)
        if shape is None or not seen(bias).is_static or len(shape) != 1 or len(terms[1]) != 2:
            return None
    return _Product((pair[0], terms[0]), (pair[1], terms[1]), result, bias)


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor with dimensions, None of anything else."""
    if not isinstance(value, fx.Node) or not was_seen(value) or seen(value).zero_dim:
        return None
    shape = seen(value).shape
    return shape if isinstance(shape, tuple) and shape else None


def _summed(product: _Product) -> str | None:
    """Return the letters that are summed over, None where no linear map gives the same."""
    x, weight, result = product.x[1], product.weight[1], product.result
    if any(len(set(term)) != len(term) for term in (x, weight, result)):
        return None
    sizes = dict(zip(x, seen(product.x[0]).shape, strict=True))
    own = zip(weight, seen(product.weight[0]).shape, strict=True)
    if any(sizes.get(letter, size) != size for letter, size in own):  # broadcast
        return None
    summed = "".join(letter for letter in x if letter in weight)
    stay = x.removesuffix(summed)
    new = set(weight) - set(summed)
    ends = x.endswith(summed) and result.startswith(stay) and new == set(result[len(stay) :])
    return summed if summed and ends and not new & set(x) else None


def _as_linear(graph: fx.Graph, product: _Product, summed: str) -> fx.Node:
    x, (weight, letters) = product.x[0], product.weight
    shape = dict(zip(letters, seen(weight).shape, strict=True))
    new = product.result[len(product.x[1]) - len(summed) :]
    order = [letters.index(letter) for letter in new + summed]
    if order != sorted(order):
        weight = graph.call_method("permute", (weight, *order))
    if len(new) != 1 or len(summed) != 1:
        sizes = (math.prod(shape[a] for a in new), math.prod(shape[a] for a in summed))
        weight = graph.call_method("reshape", (weight, *sizes))
    if len(summed) > 1:
        x = graph.call_method("flatten", (x, -len(summed)))
    bias = () if product.bias is None else (product.bias,)
    result = graph.call_function(F.linear, (x, weight, *bias))
    if not new:
        return graph.call_method("squeeze", (result, -1))
    if len(new) > 1:
        return graph.call_method("unflatten", (result, -1, tuple(shape[a] for a in new)))
    return result
