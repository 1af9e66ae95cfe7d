"""Move the scale that pretrained norms have learned into the filters, where it is filtered."""

from __future__ import annotations

import torch
from torch import nn

from prifu_plugin.errors import ConfigError, NoSiteError, OrderError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.host import is_folded, keep_fixed
from prifu_plugin.graph.insert import filters
from prifu_plugin.graph.state import wrap_state
from prifu_plugin.graph.values import check_present
from prifu_plugin.sharded import check_unsharded


def absorb(model: nn.Module) -> dict[str, int]:
    """Let W take over the scale of the norms, so that the threshold sees how strong channels are.

    Of gain * W * (gamma * n + beta), the product W * gamma is all that counts: while gamma trains
    freely, it may undo what the decay does to W. Here W becomes W * abs(gamma), gamma its sign,
    beta goes behind the filter, and both stay fixed. Call it on a freshly wrapped, pretrained
    model, before the optimizer is built; docs/results/paper/finetune-cpu.md has what it changes.

    Args:
        model: wrapped with `bias=True` (for norms that have a shift); changed in place.

    Returns:
        Path -> number of channels that close by it at once, since their scale is at most alpha
        times the largest of their layer; the others compute what they did.

    Raises:
        OrderError: if the model is not wrapped, or its filters have closed channels already.
        ConfigError: if a norm has a shift and its filter no bias.
        NoSiteError: if no norm has a scale of its own.

    Example:
        >>> import prifu_plugin as prifu
        >>> net = prifu.wrap(nn.Sequential(nn.BatchNorm1d(3)), bias=True)
        >>> _ = net[0].weight.data.copy_(torch.tensor([2.0, -1.0, 0.01]))
        >>> absorb(net)
        {'0': 1}
        >>> net[0].weight.tolist(), [round(w, 3) for w in net[0].prifu.weight.tolist()]
        ([1.0, -1.0, 1.0], [0.2, 0.1, 0.001])
    """
    wrap_state(model)
    check_present(model)
    check_unsharded(model, "absorb")
    pairs = [
        (path, model.get_submodule(path), unit)
        for path, unit in filters(model).items()
        if _has_scale(model, path)
    ]
    if not pairs:
        raise NoSiteError(
            f"No norm of this {type(model).__name__} has a scale that a filter could absorb."
        )
    for path, host, unit in pairs:
        _check(path, host, unit)
    return {path: count for path, host, unit in pairs if (count := _move(host, unit))}


def _has_scale(model: nn.Module, path: str) -> bool:
    try:
        host = model.get_submodule(path)
    except AttributeError:  # a filter behind a functional normalization
        return False
    return is_folded(host) and isinstance(getattr(host, "weight", None), nn.Parameter)


def _check(path: str, host: nn.Module, unit: PriFU) -> None:
    if unit.holds_scale or bool(unit.closed.any()):
        raise OrderError(
            f"The filter of '{path}' has been trained or has absorbed a scale already: call absorb "
            "once, right after wrap."
        )
    if getattr(host, "bias", None) is not None and unit.bias is None:
        raise ConfigError(
            f"'{path}' has a shift, and its filter no bias to take it: wrap with bias=True."
        )


def _move(host: nn.Module, unit: PriFU) -> int:
    scale, shift = host.get_parameter("weight"), getattr(host, "bias", None)
    with torch.no_grad():
        if shift is not None and unit.bias is not None:
            unit.bias.add_(unit.scale() * shift)
            shift.zero_()
        unit.weight.mul_(scale.abs())
        scale.copy_(torch.where(scale < 0, -1.0, 1.0))
    unit.holds_scale, unit.frees_scale = True, scale.requires_grad
    keep_fixed(host, unit)
    return int(unit.closed.sum())
