"""Slice layers and tensors: what the rewriter calls for the nodes that change."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.cut import CutFilter
from prifu_plugin.device import like_of
from prifu_plugin.filter import PriFU, along
from prifu_plugin.graph.folding import folded_parameters, folds
from prifu_plugin.graph.host import detach, filter_of, is_host
from prifu_plugin.graph.norms import norm_spec
from prifu_plugin.graph.state import copied, emptied
from prifu_plugin.names import CHILD
from prifu_plugin.prune.layout import FILL
from prifu_plugin.prune.plan import SliceLinear
from prifu_plugin.prune.transposed import TRANSPOSED, rows_of_outputs, turned


def has_filters(module: nn.Module) -> bool:
    """Whether a copy of a module without filters has other parameters."""
    return any(isinstance(part, PriFU) for part in module.modules())


def selected(value: Tensor, select: tuple[tuple[int, tuple[int, ...]], ...]) -> Tensor:
    """Slice a tensor along some dimensions."""
    for dim, indices in select:
        value = value.index_select(dim, torch.tensor(indices, device=value.device))
    return value


def slice_linear(
    module: Any, kernel: SliceLinear, bias: Tensor | None, delta: Tensor | None
) -> Any:
    """Return a copy of a linear map with the rows and columns of a kernel."""
    weight = rows_of_outputs(module)
    sliced = _taken(weight, kernel)
    if kernel.zero_rows:
        sliced[list(kernel.zero_rows)] = 0.0
    if delta is not None:
        sliced = sliced + delta.reshape(sliced.shape)
    if isinstance(module, TRANSPOSED):
        sliced = turned(sliced, kernel.groups)
    twin = _shell(module)
    twin.weight = nn.Parameter(sliced.to(weight.dtype), module.weight.requires_grad)
    if bias is not None:
        trained = (module.weight if module.bias is None else module.bias).requires_grad
        twin.bias = nn.Parameter(bias.to(weight), trained)
    elif module.bias is not None:
        sliced_bias = _pick(module.bias.detach(), 0, kernel.rows).clone()
        twin.bias = nn.Parameter(sliced_bias, module.bias.requires_grad)
    width = len(kernel.columns[0]) * kernel.groups
    if isinstance(module, nn.Linear):
        twin.in_features, twin.out_features = width, len(kernel.rows)
    else:
        twin.in_channels, twin.out_channels = width, len(kernel.rows)
        twin.groups = kernel.groups
    return twin


GROUPS = ("num_groups", "groups")
"""Attributes that tell in how many groups a normalization takes its statistics."""


def slice_norm(
    module: nn.Module,
    channels: tuple[int, ...] | None,
    folded: bool,
    groups: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, Tensor | None, Tensor | None]:
    """Return a normalization layer without its filter, the scale folded in or beside it.

    Args:
        module: with or without a filter.
        channels: those to keep of a layer with running statistics; None for all.
        folded: put the filter's scale into the affine parameters.
        groups: in how many groups those channels are, 0 if the layer has none.
        dtype: of the model, for a layer that has no parameters of its own.

    Returns:
        The layer, and the filter's scale and bias for a product behind it.
    """
    twin: Any = copy.deepcopy(module, emptied(module))
    scale = shift = None
    if is_host(module):
        unit = filter_of(module)
        assert isinstance(unit, PriFU)
        detach(twin)
        scale, shift = unit.scale().detach(), unit.bias
        if folded:
            for name, value in folded_parameters(module, unit, dtype).items():
                assert value is not None
                _set_affine(twin, name, value.detach(), unit.weight.requires_grad)
    _drop_hooks(twin)
    if getattr(getattr(twin, "act", None), "inplace", False):
        twin.act.inplace = False
    if channels is not None:
        _slice_members(twin, channels)
        for name in GROUPS:
            if groups and hasattr(twin, name):
                setattr(twin, name, groups)
    return twin, scale, shift


def filter_vectors(unit: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return scale, shift and noise deviation of a filter that stands alone."""
    if isinstance(unit, CutFilter):
        return unit.affine()
    assert isinstance(unit, PriFU)
    return unit.scale(), unit.bias, None


def pure_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a module that is not sliced, without in-place effect, hooks, and the filters inside.

    Args:
        module: with or without filters inside.
        dtype: that it computes in; that of its own numbers by default.
    """
    twin: Any = copied(module)
    if getattr(twin, "inplace", False):
        twin.inplace = False
    dtype = like_of(module).dtype if dtype is None else dtype
    hosts = [(path, m) for path, m in twin.named_modules(remove_duplicate=False) if is_host(m)]
    built_in: dict[nn.Module, nn.Module] = {}  # one layer may be there under several names
    for path, host in hosts:
        plain = built_in.setdefault(host, _filter_built_in(host, dtype))
        owner, _, name = path.rpartition(".")
        if path:
            setattr(twin.get_submodule(owner), name, plain)
        else:
            twin = plain
    _drop_hooks(twin)
    return twin  # type: ignore[no-any-return]


def _filter_built_in(host: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a layer with its filter in the affine parameters, or as a product behind it."""
    unit, spec = host._modules[CHILD], norm_spec(host)
    if not isinstance(unit, PriFU) or spec is None:
        return host
    layer, scale, shift = slice_norm(host, None, folds(spec, unit), dtype=dtype)
    if folds(spec, unit):
        return layer
    graph = fx.Graph()
    x = graph.placeholder("x")
    normed = graph.call_module("layer", (x,))
    dim: Any = unit.dim
    if unit.image_dim is not None:  # only a call tells where the channels are
        rank = graph.call_function(getattr, (normed, "ndim"))
        is_image = graph.call_function(operator.ge, (rank, 4))
        dim = graph.call_function(operator.getitem, ((unit.dim, unit.image_dim), is_image))
    last = graph.call_method("transpose", (normed, dim, -1))
    result = graph.call_function(torch.mul, (last, graph.get_attr("scale")))
    assert scale is not None
    trained = unit.weight.requires_grad
    members: dict[str, Any] = {"layer": layer, "scale": nn.Parameter(scale.to(dtype), trained)}
    if shift is not None:
        members["shift"] = nn.Parameter(shift.detach().to(dtype), shift.requires_grad)
        result = graph.call_function(torch.add, (result, graph.get_attr("shift")))
    graph.output(graph.call_method("transpose", (result, dim, -1)))
    return fx.GraphModule(members, graph)


def concat_parts(graph: fx.Graph, parts: list[Any], dim: int) -> Any:
    """Concatenate parts; a single one needs no operation."""
    return parts[0] if len(parts) == 1 else graph.call_function(torch.cat, (parts, dim))


def _taken(weight: Tensor, kernel: SliceLinear) -> Tensor:
    """Return the rows of a weight, and of each the columns of its group; zeros for FILL."""
    if kernel.groups == 1:
        taken = _pick(_pick(weight, 0, kernel.rows), 1, kernel.columns[0])
        return taken.clone(memory_format=torch.contiguous_format) if taken is weight else taken
    columns = torch.tensor(kernel.columns, device=weight.device)
    columns = columns.repeat_interleave(len(kernel.rows) // kernel.groups, 0)
    rows = torch.tensor(kernel.rows, device=weight.device)[:, None].expand_as(columns)
    absent = (rows == FILL) | (columns == FILL)
    taken = weight[rows.clamp_min(0), columns.clamp_min(0)]
    return taken.masked_fill(absent.reshape(*absent.shape, *[1] * (weight.ndim - 2)), 0.0)


def _pick(value: Tensor, dim: int, indices: tuple[int, ...]) -> Tensor:
    """Select along a dimension; FILL selects zeros. What is whole is returned itself."""
    if indices == tuple(range(value.shape[dim])):
        return value
    index = torch.tensor(indices, device=value.device)
    picked = value.index_select(dim, index.clamp_min(0))
    if FILL in indices:
        picked = picked.masked_fill(along(index == FILL, value.ndim, dim), 0.0)
    return picked


def _shell(module: nn.Module) -> Any:
    """Copy a layer without copying its weights."""
    weights: dict[int, Any] = {id(p): p for p in module.parameters(recurse=False)}
    twin = copy.deepcopy(module, {**emptied(module), **weights})
    _drop_hooks(twin)
    return twin


def _drop_hooks(module: nn.Module) -> None:
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part._state_dict_hooks.clear()
        part._load_state_dict_pre_hooks.clear()


def _set_affine(module: Any, name: str, value: Tensor, trained: bool) -> None:
    if name in module._buffers:
        module._buffers[name] = value.clone()
        return
    old = module._parameters.get(name)
    dtype = value.dtype if old is None else old.dtype
    trained = trained if old is None else old.requires_grad
    module._parameters[name] = nn.Parameter(value.clone().to(dtype), trained)
    if hasattr(module, "affine"):
        module.affine = True
    if hasattr(module, "elementwise_affine"):
        module.elementwise_affine = True


def _slice_members(module: Any, channels: tuple[int, ...]) -> None:
    index = torch.tensor(channels)
    size = None
    for members in (module._parameters, module._buffers):
        for name, value in members.items():
            if value is None or value.ndim == 0:
                continue
            size = len(channels)
            cut = value.detach()[index.to(value.device)].clone()
            members[name] = (
                nn.Parameter(cut, value.requires_grad) if members is module._parameters else cut
            )
    for name in ("num_features", "num_channels", "num_parameters"):
        if size is not None and hasattr(module, name):
            setattr(module, name, size)
