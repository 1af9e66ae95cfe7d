"""Linear maps called as functions become layers, so that they are sliced like layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prifu_plugin.graph.capture import Captured
from prifu_plugin.names import value_at
from prifu_plugin.prune.seen import seen
from prifu_plugin.prune.transposed import TRANSPOSED

_LAYERS: dict[Any, type[nn.Module]] = {
    F.linear: nn.Linear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}
_TAKEN = ("weight", "bias")
_TENSORS = ("input", *_TAKEN)
_NUMBERS = ("stride", "padding", "dilation", "groups")
_NUMBERS_OF_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")


def make_layers(captured: Captured) -> bool:
    """Replace functional linear maps by layers, in place; returns whether there were any.

    F.linear with a parameter as its weight stays, which has a rule of its own. Only where the layer
    can take the weight over: if it follows from buffers, which no training changes, or from
    parameters that nothing else reads.

    Args:
        captured: a model, whose children the layers become, and a graph with recorded examples,
            which tell what follows from parameters alone.
    """
    root, graph = captured.root, captured.graph
    found = False
    for node in list(graph.nodes):
        given = _settings(node) if node.target in _LAYERS and not _is_flat(node) else None
        if given is None or not all(can_be_taken_over(root, given.get(p), node) for p in _TAKEN):
            continue
        path = put_beside(root, node, _layer(node, given))
        if any(_is_changed(given[part]) for part in _TAKEN if given.get(part) is not None):
            captured.notes.append((path, _COMPUTED))
        for part in _TAKEN:
            if given.get(part) is not None:
                captured.computed[f"{path}.{part}"] = _in_fp64(captured, given[part])
        with graph.inserting_before(node):
            called = graph.call_module(path, (given["input"],))
        node.replace_all_uses_with(called)
        graph.erase_node(node)
        found = True
    return found


def put_beside(root: nn.Module, node: fx.Node, layer: nn.Module) -> str:
    """Add a layer to the module whose forward makes a call; return its path."""
    owner = next(reversed(node.meta.get("nn_module_stack") or [""]))
    home, name = root.get_submodule(owner), "layer"
    while hasattr(home, name):
        name += "_"
    path = f"{owner}.{name}" if owner else name
    if not isinstance(home, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        home.add_module(name, layer)
        return path
    holder = nn.Identity()  # what a container runs as one of its own changes nothing
    holder.add_module("layer", layer)
    home.add_module(name, holder)
    return f"{path}.layer"


def _is_flat(node: fx.Node) -> bool:
    """Whether a linear map has a parameter as its weight."""
    weight = node.args[1] if node.target is F.linear else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _settings(node: fx.Node) -> dict[str, Any] | None:
    names = (*_TENSORS, *_numbers(node))
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    numbers = [given.get(name) for name in _numbers(node)]
    if any(isinstance(value, fx.Node) for value in torch.utils._pytree.tree_leaves(numbers)):
        return None
    return given


def _numbers(node: fx.Node) -> tuple[str, ...]:
    """Return the names of the arguments that are no tensors, in the order of the function."""
    if node.target is F.linear:
        return ()
    return _NUMBERS_OF_TRANSPOSED if _LAYERS[node.target] in TRANSPOSED else _NUMBERS


def can_be_taken_over(root: nn.Module, value: Any, reader: fx.Node) -> bool:
    """Whether a layer may hold a tensor: it follows from parameters that nothing else reads.

    Args:
        root: the model, whose layers read their own parameters.
        value: a node of the graph; None for no tensor, which is no hindrance.
        reader: the call that becomes a layer.
    """
    if value is None:
        return True
    if not isinstance(value, fx.Node) or not seen(value).is_static:
        return False
    made_of = {value}
    _collect(value, made_of)
    if not any(_is_trained(n) for n in made_of):
        return True
    read = {str(n.target) for n in made_of if n.op == "get_attr"}
    if {id(value_at(root, path)) for path in read} & parameters_of_layers(root, reader.graph):
        return False
    others = {n for n in reader.graph.nodes if n.op == "get_attr" and str(n.target) in read}
    return all(user in made_of or user is reader for n in made_of | others for user in n.users)


def parameters_of_layers(root: nn.Module, graph: fx.Graph) -> set[int]:
    """Return the ids of the parameters of all layers that a graph calls."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    return {id(p) for path in called for p in root.get_submodule(path).parameters()}


def _collect(node: fx.Node, found: set[fx.Node]) -> None:
    for source in node.all_input_nodes:
        if source not in found:
            found.add(source)
            _collect(source, found)


def _is_trained(value: fx.Node) -> bool:
    recorded = seen(value).static
    return value.op == "get_attr" and isinstance(recorded, Tensor) and recorded.requires_grad


def _learns(value: fx.Node) -> bool:
    """Whether gradients reach a parameter that a tensor is made of."""
    if value.target in ("detach", torch.detach):
        return False
    return _is_trained(value) or any(map(_learns, value.all_input_nodes))


def _is_changed(value: fx.Node) -> bool:
    """Whether a tensor is more than a trained parameter in another shape."""
    made_of = {value}
    _collect(value, made_of)
    return _learns(value) and not all(map(_moves, made_of))


def _moves(node: fx.Node) -> bool:
    said = node.args[1] if node.target is getattr else node.target
    return node.op == "get_attr" or str(said) in _MOVES or not seen(node).shape


_MOVES = {"t", "T", "permute", "reshape", "view", "transpose", "flatten", "contiguous", "squeeze"}
_COMPUTED = (
    "its weight is computed from parameters, of which the pruned model holds the result: training "
    "changes that freely, without what masks or normalizes it"
)


def _layer(node: fx.Node, given: dict[str, Any]) -> nn.Module:
    weight: Tensor = seen(given["weight"]).static
    bias = given.get("bias")
    groups = given.get("groups", 1)
    numbers = {name: given[name] for name in _numbers(node) if name in given}
    cls: Any = _LAYERS[node.target]
    inputs, outputs = weight.shape[1] * groups, weight.shape[0]
    if cls in TRANSPOSED:
        inputs, outputs = outputs, inputs
    with torch.device("meta"):
        kernel = [] if cls is nn.Linear else [tuple(weight.shape[2:])]
        layer = cls(inputs, outputs, *kernel, bias=False, **numbers)
    layer.weight = _parameter(given["weight"])
    layer.bias = None if bias is None else _parameter(bias)
    made: nn.Module = layer.eval()
    return made


def _parameter(value: fx.Node) -> nn.Parameter:
    recorded: Tensor = seen(value).static
    return nn.Parameter(recorded.detach().clone(), _learns(value))


def _in_fp64(captured: Captured, value: fx.Node) -> Any:
    """Compute a tensor anew in fp64: what was recorded has the model's own precision."""
    if not seen(value).is_static:
        return seen(value).example
    recorded = seen(value).static
    if not isinstance(recorded, Tensor) or not recorded.is_floating_point():
        return recorded
    if value.op == "get_attr":
        return captured.computed.get(str(value.target), recorded.detach().double())
    args = fx.node.map_arg((value.args, value.kwargs), lambda n: _in_fp64(captured, n))
    with torch.no_grad():
        if value.op == "call_method":
            target, *rest = args[0]
            return getattr(target, str(value.target))(*rest, **args[1])
        if value.op == "call_module":
            module = captured.root.get_submodule(str(value.target))
            return copy.deepcopy(module).double()(*args[0], **args[1])
        assert callable(value.target)
        return value.target(*args[0], **args[1])
