"""Prepare a captured graph for analysis: no in-place effects, no packed attention modules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.augmented import AUGMENTED
from prifu_plugin.graph.capture import CONSTANT, Captured, capture
from prifu_plugin.graph.guards import drop_dtype_guards, is_guard
from prifu_plugin.graph.memory import readers, sharing
from prifu_plugin.graph.sized import capture_sized
from prifu_plugin.prune.constants import made_in_fp64
from prifu_plugin.prune.spell_out import spell_out, spell_out_glu


def lower(
    model: nn.Module, given: int | None = None, examples: Sequence[Tensor] | None = None
) -> Captured:
    """Capture a model in eval mode as a graph of pure operations.

    In-place operations become their pure twins, nn.MultiheadAttention becomes the linear maps it
    consists of, and assertions go.

    Args:
        model: a module in eval mode; it is not changed, the graph refers to it.
        given: how many positional inputs are given.
        examples: inputs with which to look inside modules that decide on sizes.

    Raises:
        CaptureError: if the model cannot be traced.
    """

    def trace(model: nn.Module) -> Captured:
        return capture(model, given) if examples is None else capture_sized(model, examples)

    captured = trace(model)
    captured.computed.update(made_in_fp64(captured, trace))
    graph = captured.graph
    for node in list(graph.nodes):
        if _is_assertion(node):
            graph.erase_node(node)
        elif node.op == "call_module" and type(gate := _called(model, node)) is nn.GLU:
            x = node.args[0] if node.args else node.kwargs["input"]
            spell_out_glu(graph, node, x, gate.dim)
        elif node.op == "call_module" and _is_plain_attention(model, node):
            _lower_attention(graph, node, _called(model, node))
        else:
            _make_pure(node, model)
            spell_out(graph, node)
    drop_dtype_guards(graph)
    drop_unused(graph)
    graph.lint()
    return captured


def _called(model: nn.Module, node: fx.Node) -> nn.Module:
    return model.get_submodule(str(node.target))


def _is_assertion(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    asserts = node.op == "call_function" and name in ("_assert", "_assert_is_none")
    return asserts and not node.users and not is_guard(node)


def drop_unused(graph: fx.Graph) -> None:
    """Erase what nothing reads, but for inputs, outputs and guards."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users and not is_guard(node):
            graph.erase_node(node)


# In-place effects.


def name_effects(graph: fx.Graph, model: nn.Module) -> None:
    """Let whoever reads a tensor behind an in-place operation read that operation's result.

    Only then do the edges of a graph say what depends on what. Where nobody does, nothing changes.

    Raises:
        CaptureError: if what is read is a view of it, which no edge can tell.
    """
    for node in list(graph.nodes):
        operand = node.args[0] if node.args else node.kwargs.get("input")
        asks = node.op in ("call_module", "call_function", "call_method")
        if not asks or not isinstance(operand, fx.Node) or not _is_inplace(node, model):
            continue
        later = set(_after(node))
        shared = sharing(operand, model)
        constant = any(alias.op == "get_attr" for alias in shared)  # which the next run reads
        read = (
            u for alias, part in shared.items() if alias is not node for u in readers(alias, part)
        )
        if constant or any(user in later for user in read):
            _make_pure(node, model)


_PURE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **AUGMENTED,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
}


_PURE_METHODS: dict[Any, Callable[..., Any]] = {"zero_": torch.zeros_like, "fill_": torch.full_like}
"""Those whose pure twins have another name."""


def _make_pure(node: fx.Node, model: nn.Module) -> None:
    """Replace an in-place operation; whoever reads its operand afterwards reads the result."""
    if isinstance(node.target, type):  # a container is made, whatever its keys are called
        return
    if not node.args and "input" in node.kwargs:
        node.args = (node.kwargs["input"],)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "input"}
    if not _is_inplace(node, model):
        return
    if node.op == "call_function":
        node.target = _pure_function(node)
    elif node.op == "call_method" and node.target in _PURE_METHODS:
        node.op, node.target = "call_function", _PURE_METHODS[str(node.target)]
    elif node.op == "call_method":
        node.target = str(node.target).removesuffix("_")
        if not hasattr(torch.Tensor, node.target):
            raise CaptureError(f"'{node.name}' overwrites a tensor in place ({node.target}_).")
    node.kwargs = {k: False if k == "inplace" else v for k, v in node.kwargs.items()}
    operand = node.args[0]
    if not isinstance(operand, fx.Node):
        raise CaptureError(f"'{node.name}' writes in place into something that is no tensor.")
    if str(operand.target).startswith(CONSTANT) and operand.op == "get_attr" and not node.users:
        raise CaptureError(
            f"'{node.name}' writes in place into a tensor that the forward makes of numbers, which "
            "a graph holds once for all calls. Assign its result instead."
        )
    result = _in_its_type(node, operand, model)
    later = set(_after(result))
    # Later views are of the result, and so is what dropout in place returns.
    for alias, part in sharing(operand, model).items():
        if alias in (operand, node, result) or alias in later:
            continue
        if not any(user in later for user in readers(alias, part)):
            continue
        if _itself(alias, model) is _itself(operand, model):
            alias.replace_all_uses_with(result, delete_user_cb=lambda user: user in later)
        else:
            raise CaptureError(
                f"'{node.name}' writes in place into '{operand.name}', which shares memory with "
                f"'{alias.name}', read afterwards. Write it out of place."
            )
    operand.replace_all_uses_with(result, delete_user_cb=lambda user: user in later)


def _in_its_type(node: fx.Node, operand: fx.Node, model: nn.Module) -> fx.Node:
    """Return what a tensor is after a write: other operands do not change its type.

    Only a model with weights of less than fp32 has another type to change to.
    """
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    if not low or len(node.all_input_nodes) < 2:
        return node
    with node.graph.inserting_after(node):
        cast = node.graph.call_method("type_as", (node, operand))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    return cast


def _is_inplace(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(_called(model, node), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    name = getattr(node.target, "__name__", "")
    keyword = getattr(node.target, "__module__", "") == "_operator"  # and_, or_, not_, is_
    named = name.endswith("_") and not name.endswith("__") and not keyword
    return (
        node.target in _PURE_FUNCTIONS
        or (named and node.op == "call_function")
        or bool(node.kwargs.get("inplace"))
        or node.kwargs.get("out") is not None
    )


def _pure_function(node: fx.Node) -> Callable[..., Any]:
    target: Any = node.target
    if node.kwargs.get("out") is not None:
        raise CaptureError(f"'{node.name}' writes into out=. Assign its result instead.")
    if target in _PURE_FUNCTIONS:
        pure: Callable[..., Any] = _PURE_FUNCTIONS[target]
        return pure
    name = str(getattr(target, "__name__", ""))
    if not name.endswith("_"):
        return target  # type: ignore[no-any-return]
    for home in (F, torch):
        twin = getattr(home, name.removesuffix("_"), None)
        if twin is not None:
            return twin  # type: ignore[no-any-return]
    raise CaptureError(f"'{node.name}' overwrites a tensor in place ({name}).")


def _itself(node: fx.Node, model: nn.Module) -> fx.Node:
    """Return what a node is the same tensor as, through modules that return what they are given."""
    while node.op == "call_module" and node.args and isinstance(node.args[0], fx.Node):
        module: Any = _called(model, node)
        if not isinstance(module, nn.Identity) and not (
            isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0
        ):
            break
        node = node.args[0]
    return node


def _after(node: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


# Packed attention.


def _is_plain_attention(model: nn.Module, node: fx.Node) -> bool:
    """Whether a call is unmasked self-attention, batch first, whose weights nobody reads."""
    module = _called(model, node)
    if type(module) is not nn.MultiheadAttention:
        return False
    named = [node.kwargs[name] for name in ("key", "value") if name in node.kwargs]
    given: list[Any] = [*node.args, *named]
    query, others = given[0], given[1:]
    extra = {k: v for k, v in node.kwargs.items() if k not in ("query", "key", "value")}
    return (
        len(others) == 2
        and all(other is query for other in others)
        and module.batch_first
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and all(v in (None, False) for k, v in extra.items() if k not in _OF_WEIGHTS)
        and all(_is_first_item(user) or _is_unread_item(user) for user in node.users)
    )


_OF_WEIGHTS = ("need_weights", "average_attn_weights")


def _is_first_item(node: fx.Node) -> bool:
    return node.target is operator.getitem and bool(node.args[1] == 0)


def _is_unread_item(node: fx.Node) -> bool:
    return node.target is operator.getitem and not node.users


def _lower_attention(graph: fx.Graph, node: fx.Node, attention: nn.Module) -> None:
    assert isinstance(attention, nn.MultiheadAttention)
    x, path, heads = node.args[0], node.target, attention.num_heads
    width = attention.head_dim
    with graph.inserting_before(node):
        weight = graph.get_attr(f"{path}.in_proj_weight")
        bias = None
        if attention.in_proj_bias is not None:
            bias = graph.get_attr(f"{path}.in_proj_bias")
        packed = graph.call_function(F.linear, (x, weight, bias))
        batch = graph.call_method("size", (x, 0))
        tokens = graph.call_method("size", (x, 1))
        split = graph.call_method("view", (packed, batch, tokens, 3, heads, width))
        turned = graph.call_method("permute", (split, 2, 0, 3, 1, 4))
        query, key, value = (graph.call_function(operator.getitem, (turned, i)) for i in range(3))
        mixed = graph.call_function(
            F.scaled_dot_product_attention, (query, key, value), {"scale": width**-0.5}
        )
        back = graph.call_method("transpose", (mixed, 1, 2))
        merged = graph.call_method("reshape", (back, batch, tokens, heads * width))
        result = graph.call_module(f"{path}.out_proj", (merged,))
    for user in list(node.users):
        if user.users:
            user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)
