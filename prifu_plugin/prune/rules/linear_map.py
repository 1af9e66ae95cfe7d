"""Recognize linear maps: Linear, convolutions and their transposes, grouped or not, F.linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prifu_plugin.graph.padding import only_pads
from prifu_plugin.names import value_at
from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.functional_layers import parameters_of_layers
from prifu_plugin.prune.rules.base import Analysis
from prifu_plugin.prune.transposed import TRANSPOSED, rows_of_outputs


@dataclass(frozen=True)
class LinearMap:
    """A linear map along one dimension, without its spatial part.

    Attributes:
        weight: kernel summed over space, (groups, out per group, in per group).
        connected: whether any tap is not 0, same shape.
        bias: (out,), zeros if there is none.
        dim: the dimension it maps, in the input's shape.
        padded: a constant input channel does not give a constant output, because zeros are padded
            around it or the kernel's taps cover places unevenly.
        mappable: a two-dimensional convolution whose padding is given in numbers.
        spans: it reads several places, or leaves some out.
    """

    weight: Tensor
    connected: Tensor
    bias: Tensor
    dim: int
    padded: bool
    mappable: bool = False
    spans: bool = False

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.weight.shape[0]

    @property
    def outputs(self) -> int:
        """Output channels per group."""
        return self.weight.shape[1]

    @property
    def inputs(self) -> int:
        """Input channels per group."""
        return self.weight.shape[2]


def linear_map(analysis: Analysis, node: fx.Node) -> LinearMap | None:
    """Return the linear map of a node, or None if it is something else."""
    if node.op == "call_module":
        return _module_map(analysis, node)
    if node.target is F.linear and len(node.args) >= 2:
        return _functional_map(analysis, node)
    return None


def _module_map(analysis: Analysis, node: fx.Node) -> LinearMap | None:
    module = analysis.module(node)
    fact = analysis.input_fact(node)
    if fact is None:
        return None
    if isinstance(module, TRANSPOSED):
        return _transposed_map(node, module, fact)
    if isinstance(module, nn.Linear) and _is_linear(module):
        return _flat(module.weight, module.bias, len(fact.shape) - 1)
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    forward = type(module).forward
    plain = any(forward is cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    same = only_pads(module)
    if not (plain or same):
        return None
    if len(fact.shape) != module.weight.ndim:
        return None
    taps = module.weight.detach().double().flatten(2)
    groups, outputs = module.groups, module.out_channels // module.groups
    padding = module.padding
    padded = same or (padding == "same" and taps.shape[2] > 1)
    padded = padded or (not isinstance(padding, str) and any(p != 0 for p in padding))
    return LinearMap(
        taps.sum(2).unflatten(0, (groups, outputs)),
        (taps != 0).any(2).unflatten(0, (groups, outputs)),
        _bias_or_zeros(module.bias, module.out_channels),
        1,
        padded and module.padding_mode == "zeros",
        plain and isinstance(module, nn.Conv2d) and not isinstance(padding, str),
        not _is_pointwise(module),
    )


def _transposed_map(node: fx.Node, module: nn.Module, fact: Fact) -> LinearMap | None:
    assert isinstance(module, TRANSPOSED)
    sized = len(node.args) + len(node.kwargs) > 1  # forward(x, output_size)
    own = all(type(module).forward is not cls.forward for cls in TRANSPOSED)
    if sized or own or len(fact.shape) != module.weight.ndim:
        return None
    taps = rows_of_outputs(module).double().flatten(2)
    groups, outputs = module.groups, module.out_channels // module.groups
    return LinearMap(
        taps.sum(2).unflatten(0, (groups, outputs)),
        (taps != 0).any(2).unflatten(0, (groups, outputs)),
        _bias_or_zeros(module.bias, module.out_channels),
        1,
        not _is_pointwise(module),
        spans=not _is_pointwise(module),
    )


def _is_pointwise(module: Any) -> bool:
    """Whether a convolution is a linear map at each place by itself."""
    ones = {*module.kernel_size, *module.stride}
    padded = isinstance(module.padding, str) or any((*module.padding, *module.output_padding))
    return ones == {1} and not padded


def _is_linear(module: nn.Linear) -> bool:
    """Whether a Linear, or a subclass with a forward of its own, is weight * x + bias."""
    if type(module).forward is nn.Linear.forward:
        return True
    tensors = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if tensors - {"weight", "bias"}:  # a mask or an adapter, which would have to be sliced too
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, module.in_features, generator=generator).to(module.weight)
    with torch.no_grad():
        return torch.equal(module(x), F.linear(x, module.weight, module.bias))


def _functional_map(analysis: Analysis, node: fx.Node) -> LinearMap | None:
    x, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    fact = analysis.values.get(x) if isinstance(x, fx.Node) else None
    parameters = [p for p in (weight, bias) if p is not None]
    if not isinstance(fact, Fact) or not all(_is_its_own(analysis, p) for p in parameters):
        return None
    values = [analysis.fact(p).const for p in parameters if isinstance(p, fx.Node)]
    if values[0].ndim != 2:
        return None
    return _flat(values[0], values[1] if len(values) > 1 else None, len(fact.shape) - 1)


def _is_its_own(analysis: Analysis, value: Any) -> bool:
    """Whether a value is a parameter that nothing else reads, a layer neither."""
    if not isinstance(value, fx.Node) or value.op != "get_attr" or len(value.users) != 1:
        return False
    parameter = value_at(analysis.root, str(value.target))
    return id(parameter) not in parameters_of_layers(analysis.root, analysis.graph)


def _flat(weight: Tensor, bias: Tensor | None, dim: int) -> LinearMap:
    matrix = weight.detach().double().unsqueeze(0)
    return LinearMap(matrix, matrix != 0, _bias_or_zeros(bias, matrix.shape[1]), dim, False)


def _bias_or_zeros(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64) if bias is None else bias.detach().double()
