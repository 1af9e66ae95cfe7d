"""Slice layers and tensors: what the rewriter calls for the nodes that change."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.cut import CutFilter
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.host import detach, filter_of, folded_parameters, is_host
from prifu_plugin.prune.layout import FILL
from prifu_plugin.prune.plan import SliceLinear


def selected(value: Tensor, select: tuple[tuple[int, tuple[int, ...]], ...]) -> Tensor:
    """Slice a tensor along some dimensions."""
    for dim, indices in select:
        value = value.index_select(dim, torch.tensor(indices, device=value.device))
    return value


def slice_linear(
    module: Any, kernel: SliceLinear, bias: Tensor | None, delta: Tensor | None
) -> Any:
    """Return a copy of a linear map with the rows and columns of a kernel."""
    weight = module.weight.detach()
    per_group = len(kernel.rows) // kernel.groups
    blocks = []
    for group, columns in enumerate(kernel.columns):
        rows = kernel.rows[group * per_group : (group + 1) * per_group]
        blocks.append(_pick(_pick(weight, 0, rows), 1, columns))
    sliced = torch.cat(blocks)
    if kernel.zero_rows:
        sliced[list(kernel.zero_rows)] = 0.0
    if delta is not None:
        sliced = sliced + delta.reshape(sliced.shape)
    twin = _shell(module)
    twin.weight = nn.Parameter(sliced.to(weight.dtype), module.weight.requires_grad)
    if bias is not None:
        trained = module.bias is None or module.bias.requires_grad
        twin.bias = nn.Parameter(bias.to(weight), trained)
    elif module.bias is not None:
        twin.bias = nn.Parameter(_pick(module.bias.detach(), 0, kernel.rows))
    width = len(kernel.columns[0]) * kernel.groups
    if isinstance(module, nn.Linear):
        twin.in_features, twin.out_features = width, len(kernel.rows)
    else:
        twin.in_channels, twin.out_channels = width, len(kernel.rows)
        twin.groups = kernel.groups
    return twin


def slice_norm(
    module: nn.Module, channels: tuple[int, ...] | None, folded: bool
) -> tuple[nn.Module, Tensor | None, Tensor | None]:
    """Return a normalization layer without its filter, the scale folded in or beside it.

    Args:
        module: with or without a filter.
        channels: those to keep of a layer with running statistics; None for all.
        folded: put the filter's scale into the affine parameters.

    Returns:
        The layer, and the filter's scale and bias for a product behind it.
    """
    twin: Any = copy.deepcopy(module)
    scale = shift = None
    if is_host(module):
        unit = filter_of(module)
        assert isinstance(unit, PriFU)
        detach(twin)
        scale, shift = unit.scale().detach(), unit.bias
        if folded:
            for name, value in folded_parameters(module, unit).items():
                assert value is not None
                _set_affine(twin, name, value.detach())
    if getattr(getattr(twin, "act", None), "inplace", False):
        twin.act.inplace = False
    if channels is not None:
        _slice_members(twin, channels)
    return twin, scale, shift


def filter_vectors(unit: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return scale, shift and noise deviation of a filter that stands alone."""
    if isinstance(unit, CutFilter):
        return unit.affine()
    assert isinstance(unit, PriFU)
    return unit.scale(), unit.bias, None


def pure_copy(module: nn.Module) -> nn.Module:
    """Copy a module that is not sliced, without its in-place effect."""
    twin: Any = copy.deepcopy(module)
    if getattr(twin, "inplace", False):
        twin.inplace = False
    return twin  # type: ignore[no-any-return]


def concat_parts(graph: fx.Graph, parts: list[Any], dim: int) -> Any:
    """Concatenate parts; a single one needs no operation."""
    return parts[0] if len(parts) == 1 else graph.call_function(torch.cat, (parts, dim))


def _pick(value: Tensor, dim: int, indices: tuple[int, ...]) -> Tensor:
    """Select along a dimension; FILL selects zeros."""
    index = torch.tensor(indices, device=value.device)
    picked = value.index_select(dim, index.clamp_min(0))
    if FILL in indices:
        shape = [-1 if d == dim else 1 for d in range(value.ndim)]
        picked = picked * (index != FILL).reshape(shape)
    return picked


def _shell(module: nn.Module) -> Any:
    """Copy a layer without copying its weights."""
    memo = {id(p): p for p in module.parameters(recurse=False)}
    return copy.deepcopy(module, memo)


def _set_affine(module: Any, name: str, value: Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = value.clone()
        return
    old = module._parameters.get(name)
    dtype = value.dtype if old is None else old.dtype
    trained = old is None or old.requires_grad
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
    if size is not None and hasattr(module, "num_features"):
        module.num_features = size
