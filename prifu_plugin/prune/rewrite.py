"""Carry out a plan: build the pruned model, node by node. What exists is decided before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.graph.capture import Captured
from prifu_plugin.keyed import KeyedNoise
from prifu_plugin.names import WHOLE, value_at
from prifu_plugin.prune.asked_sizes import spare_asked
from prifu_plugin.prune.border import border_map
from prifu_plugin.prune.kernels import (
    concat_parts,
    filter_vectors,
    has_filters,
    pure_copy,
    selected,
    slice_linear,
    slice_norm,
)
from prifu_plugin.prune.layout import FILL, Conform
from prifu_plugin.prune.loadable import make_loadable
from prifu_plugin.prune.lower import drop_unused
from prifu_plugin.prune.members import Members, like
from prifu_plugin.prune.nodes import SIZED, size_arguments
from prifu_plugin.prune.places import PLACES, places
from prifu_plugin.prune.plan import (
    Alias,
    Concat,
    Keep,
    NodePlan,
    Parameter,
    Plan,
    Scale,
    SelectNorm,
    SliceLinear,
    SliceNorm,
)
from prifu_plugin.prune.quiet import NOISE
from prifu_plugin.prune.seen import seen
from prifu_plugin.prune.shape_answers import ShapeAnswers


def rewrite(captured: Captured, plan: Plan) -> fx.GraphModule:
    """Build the pruned model that a plan describes.

    Args:
        captured: the lowered graph the plan was made for; neither it nor its model is changed.
        plan: with its constants, or without (a rebuilt plan): they are then zeros, to be loaded.

    Returns:
        A plain GraphModule with the original submodule names.
    """
    return _Rewriter(captured, plan).run()


class _Rewriter:
    def __init__(self, captured: Captured, plan: Plan) -> None:
        self.root = captured.root
        self.old = captured.graph
        self.plan = plan
        self.named = {node.name: node for node in self.old.nodes}
        self.plans = {node.name: node for node in plan.nodes}
        self.new = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.members = Members(self.root, self.new)
        self.asked = ShapeAnswers(self.new, self.plans, self.values)

    def run(self) -> fx.GraphModule:
        for node in self.old.nodes:
            if node.op == "output":
                operands = {
                    name: self._conformed(node, name, conform)
                    for name, conform in self.plans[node.name].operands
                }
                self.new.output(self._argument(node, node.args[0], operands))
            elif node.op == "placeholder":
                self.values[node] = self.new.node_copy(node)
            elif node.name in self.plans and not self._is_taken_over(node):
                self.values[node] = self._emit(node, self.plans[node.name])
                if isinstance(self.values[node], fx.Node):
                    self.values[node].meta.setdefault("original", node.name)
        drop_unused(self.new)
        spare_asked(self.new, self.members.found)
        make_loadable(self.new)
        self._tie()
        module = fx.GraphModule(self.members.read(), self.new, class_name=type(self.root).__name__)
        module.meta[PLACES] = places(self.old, self.new, self.values)
        return module.eval()

    def _is_taken_over(self, node: fx.Node) -> bool:
        """Whether a parameter only goes into linear maps, which bring their own slices."""
        plans = [self.plans[user.name] for user in node.users if user.name in self.plans]
        return node.op == "get_attr" and all(isinstance(p.kernel, SliceLinear) for p in plans)

    def _emit(self, node: fx.Node, plan: NodePlan) -> Any:
        kernel = plan.kernel
        operands = {name: self._conformed(node, name, c) for name, c in plan.operands}
        if isinstance(kernel, Alias):
            name = kernel.source
            return operands[name] if name in operands else self.values[self.named[name]]
        if isinstance(kernel, Parameter):
            value = value_at(self.root, str(node.target))
            origin = (node.target, kernel.select)
            part = like(value, selected(value, kernel.select))
            return self.members.add(self._place(node), part, origin)
        if isinstance(kernel, Concat):
            listed: Any = node.args[0] if node.args else node.kwargs["tensors"]
            parts = [self._operand(listed[i], operands) for i in kernel.parts]
            return concat_parts(self.new, parts, kernel.dim)
        if isinstance(kernel, SliceLinear):
            return self._linear(node, kernel, operands)
        if isinstance(kernel, SliceNorm | SelectNorm):
            return self._norm(node, kernel, operands)
        if isinstance(kernel, Scale):
            return self._scale(node, kernel, self._operand(node.args[0], operands))
        return self._keep(node, kernel, operands)

    # Operations.

    def _keep(self, node: fx.Node, kernel: Keep, operands: dict[str, Any]) -> Any:
        if not seen(node).shape and not seen(node).nested:
            return self.asked.answer(node, lambda value: self._argument(node, value))
        args = self._argument(node, node.args, operands)
        kwargs = self._argument(node, node.kwargs, operands)
        if node.op == "get_attr":
            value = value_at(self.root, str(node.target))
            return self.members.add(self._place(node), like(value, value), (node.target, ()))
        if node.op == "call_module":
            dtype = self.members.dtype
            path = self.members.layer(
                str(node.target), kernel, lambda: pure_copy(self._called(node), dtype)
            )
            return self.new.call_module(path, tuple(args), kwargs)
        if kernel.sizes or node.target in SIZED or node.target is torch.reshape:
            sizes = self._argument(node, size_arguments(node), operands)
            for position, size in kernel.sizes:
                sizes[position] = size
            method = "reshape" if node.target is torch.reshape else str(node.target)
            return self.new.call_method(method, (args[0], *sizes))
        return self.new.create_node(node.op, node.target, tuple(args), kwargs)

    def _linear(self, node: fx.Node, kernel: SliceLinear, operands: dict[str, Any]) -> Any:
        x = self._operand(node.args[0], operands)
        bias = self._constant(kernel.bias) if kernel.bias else None
        delta = self._constant(kernel.delta) if kernel.delta else None
        if node.op == "call_module":
            module = self._called(node)
            path = self.members.layer(
                str(node.target), kernel, lambda: slice_linear(module, kernel, bias, delta)
            )
            layer = self.members.found[path]
            result = self.new.call_module(path, (x,))
            if kernel.border:
                ones = self.members.buffer(kernel.border, self._constant(kernel.border))
                border = border_map(self.new, layer, x, result, ones)
                result = self.new.call_function(torch.add, (result, border))
        else:
            weight: Any = node.args[1]
            other: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            named = [weight] + ([other] if isinstance(other, fx.Node) else [])
            values = [value_at(self.root, str(n.target)) for n in named]
            layer = nn.Linear(values[0].shape[1], values[0].shape[0], bias=len(values) > 1)
            layer.weight = nn.Parameter(values[0], values[0].requires_grad)
            if len(values) > 1:
                layer.bias = nn.Parameter(values[1], values[1].requires_grad)
            cut = slice_linear(layer, kernel, bias, delta)
            origin = (weight.target, kernel)
            parameters = [self.members.add(self._place(weight), cut.weight, origin)]
            if cut.bias is not None:
                named_bias = f"{str(weight.target).replace('.', '_')}_bias"
                place = self._place(other) if len(named) > 1 else self.members.fresh(named_bias)
                parameters.append(self.members.add(place, cut.bias, (place, kernel)))
            result = self.new.call_function(torch.nn.functional.linear, (x, *parameters))
        return self._index(node, result, 1, kernel.pick) if kernel.pick else result

    def _norm(self, node: fx.Node, kernel: SliceNorm | SelectNorm, operands: dict[str, Any]) -> Any:
        module = self._called(node)
        folded = isinstance(kernel, SliceNorm) or kernel.folded
        channels, groups = kernel.channels, 0
        if isinstance(kernel, SelectNorm):
            channels, groups = kernel.inputs, kernel.groups
        dtype = self.members.dtype
        layer, scale, shift = slice_norm(module, channels, folded, groups, dtype)
        path = self.members.layer(str(node.target), kernel, lambda: layer)
        result = self.new.call_module(path, (self._operand(node.args[0], operands),))
        if isinstance(kernel, SliceNorm):
            return result
        rank = len(seen(node).shape)
        going_on = kernel.channels
        if kernel.inputs is not None and going_on is not None:
            where = {channel: place for place, channel in enumerate(kernel.inputs)}
            going_on = tuple(where[channel] for channel in going_on)
        if going_on is not None and going_on != tuple(range(len(kernel.inputs or ()))):
            result = self._index(node, result, kernel.dim % rank, going_on)
        if not folded and scale is not None:
            result = self._vector(node, "scale", scale, kernel, rank, torch.mul, result)
        if kernel.shifted and shift is not None:
            result = self._vector(node, "shift", shift, kernel, rank, torch.add, result)
        return result

    def _scale(self, node: fx.Node, kernel: Scale, x: Any) -> Any:
        unit = self._called(node)
        scale, shift, noise = filter_vectors(unit)
        rank = len(seen(node).shape)
        result = self._vector(node, "scale", scale, kernel, rank, torch.mul, x)
        if kernel.shifted:
            result = self._vector(node, "shift", shift, kernel, rank, torch.add, result)
        if kernel.noisy:
            drawn = self._draw(node, kernel, result)
            drawn = self._vector(node, "noise", noise, kernel, rank, torch.mul, drawn)
            result = self.new.call_function(torch.add, (result, drawn))
        return result

    def _draw(self, node: fx.Node, kernel: Scale, upload: Any) -> fx.Node:
        finest = kernel.finest
        if finest is None:
            return self.new.call_function(torch.randn_like, (upload,))
        key = getattr(self._called(node), "key", None)  # a fresh model, to rebuild from, has none
        place = self.members.fresh(f"{node.name}_noise")
        path = self.members.layer(place, kernel, lambda: KeyedNoise(key, finest))
        return self.new.call_module(path, (upload,))

    def _vector(
        self, node: fx.Node, name: str, value: Any, kernel: Any, rank: int, function: Any, x: Any
    ) -> fx.Node:
        if kernel.channels is not None:
            value = value[torch.tensor(kernel.channels)]
        shape = [1] * rank
        shape[kernel.dim] = -1
        value = self.members.cast(value.detach().reshape(shape).clone())
        if name == "noise":
            vector = self.members.add(f"{NOISE}{node.name}", value)
        else:
            trained = any(p.requires_grad for p in self._called(node).parameters())
            vector = self.members.add(
                self.members.fresh(f"{node.name}_{name}"), nn.Parameter(value, trained)
            )
        return self.new.call_function(function, (x, vector))

    # Operands.

    def _operand(self, source: Any, operands: dict[str, Any]) -> Any:
        return operands[source.name] if source.name in operands else self.values[source]

    def _argument(self, node: fx.Node, value: Any, operands: dict[str, Any] | None = None) -> Any:
        """Translate an argument; a tuple of sizes may take the place of a node."""
        if isinstance(value, fx.Node):
            return self._operand(value, operands or {})
        if isinstance(value, tuple | list):
            items = [self._argument(node, item, operands) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            return {key: self._argument(node, item, operands) for key, item in value.items()}
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return slice(*(self._argument(node, item, operands) for item in parts))
        return value

    def _conformed(self, node: fx.Node, name: str, conform: Conform) -> Any:
        if conform.constant:
            return self.members.buffer(conform.constant, self._constant(conform.constant))
        source = self.named[name]
        value = self.values[source]
        for dim, positions in conform.select:
            value = self._index(node, value, dim, positions, source)
        if conform.vector:
            vector = self.members.buffer(conform.vector, self._constant(conform.vector))
            # Of another type, as under autocast, the sum would be promoted.
            vector = self.new.call_method("type_as", (vector, value))
            value = self.new.call_function(torch.add, (value, vector))
        return value

    def _index(
        self, node: fx.Node, x: Any, dim: int, positions: tuple[int, ...], source: Any = None
    ) -> fx.Node:
        """Select positions along a dimension; FILL reads a zero channel padded for it."""
        name = f"{node.name}_{source.name if source is not None else 'pick'}_{dim}"
        rank = len(seen(source or node).shape)
        if FILL in positions:
            existing = self._width(source, dim)
            padding = [0, 0] * (rank - 1 - dim)
            if positions[:existing] == tuple(range(existing)) and set(positions[existing:]) == {
                FILL
            }:
                count = len(positions) - existing
                return self.new.call_function(torch.nn.functional.pad, (x, [*padding, 0, count]))
            x = self.new.call_function(torch.nn.functional.pad, (x, [*padding, 0, 1]))
            positions = tuple(existing if p == FILL else p for p in positions)
        first = positions[0]
        if positions == tuple(range(first, first + len(positions))):
            return self.new.call_method("narrow", (x, dim, first, len(positions)))
        index = self.members.buffer(name, torch.tensor(positions))
        return self.new.call_function(torch.index_select, (x, dim, index))

    def _width(self, source: fx.Node, dim: int) -> int:
        plan = self.plans.get(source.name)
        layout = dict(plan.layout) if plan is not None else {}
        return len(layout[dim]) if dim in layout else int(seen(source).shape[dim])

    # Members of the new model.

    def _place(self, node: fx.Node) -> str:
        """Return a path for a parameter; not inside a layer that has a sliced one of its own."""
        path = str(node.target)
        owner, _, name = path.rpartition(".")
        called = any(n.op == "call_module" and n.target == owner for n in self.old.nodes)
        if not called:
            return path
        whole = f"{owner.replace('.', '_')}_{name}{WHOLE}"
        return "_" + whole if hasattr(self.root, whole) else whole

    def _tie(self) -> None:
        """Let a parameter that the graph reads be that of its layer again, if both are whole."""
        origins, found = self.members.origins, self.members.found
        for place, value in found.items():
            if not isinstance(value, nn.Parameter) or origins[place][1] != ():
                continue
            owner, _, name = str(origins[place][0]).rpartition(".")
            whole = isinstance(origins.get(owner, (None, None))[1], Keep)
            if whole and not has_filters(self.root.get_submodule(owner)):
                found[place] = getattr(found[owner], name)

    def _called(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def _constant(self, name: str) -> Tensor:
        value = self.plan.constants.get(name)
        if value is None:
            value = torch.zeros(self.plan.shapes[name], dtype=torch.float64)
        return self.members.cast(value)
