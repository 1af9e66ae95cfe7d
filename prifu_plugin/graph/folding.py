"""The scale of a filter in the affine parameters of its norm, for one call."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from prifu_plugin.filter import PriFU
from prifu_plugin.graph.norms import NormSpec


def folds(spec: NormSpec, unit: PriFU) -> bool:
    """Whether the filter can act through the normalization's own affine parameters."""
    return spec.folds and (spec.folds_bias or unit.bias is None)


def folded_parameters(
    host: nn.Module, unit: PriFU, otherwise: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return weight and bias of a normalization with the filter's scale folded in.

    gain * RIW * (n * weight + bias) + b = n * (weight * scale) + (bias * scale + b), in the
    precision of W, which is fp32 or better, rounded to that of the layer, `otherwise` if it has
    none.
    """
    scale = unit.scale()
    weight, bias = getattr(host, "weight", None), getattr(host, "bias", None)
    folded: dict[str, Tensor | None] = {"weight": scale if weight is None else weight * scale}
    if bias is not None:
        # Never -0, which would let the sign of what is closed through.
        added = scale.new_zeros(()) if unit.bias is None else unit.bias
        folded["bias"] = added.addcmul(bias, scale)
    elif unit.bias is not None:
        folded["bias"] = unit.bias
    own = [weight, bias, getattr(host, "running_mean", None)]
    dtype = next((v.dtype for v in own if v is not None), otherwise or scale.dtype)
    if "bias" not in folded and dtype in (torch.float16, torch.bfloat16):
        folded["bias"] = torch.zeros_like(scale)  # torch has no half kernel without one
    given = {name: value.to(dtype) for name, value in folded.items() if value is not None}
    if torch.compiler.is_compiling() and not _is_exporting():
        # Inductor would compute them anew for every element; what is strided it computes first.
        return {name: value.as_strided(value.shape, (1,)) for name, value in given.items()}
    return given


def remembered_parameters(
    host: nn.Module, unit: PriFU, otherwise: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return what `folded_parameters` does, without computing it again in inference on the CPU.

    Values are compared, since writes through `.data` bump no version; on other devices that would
    wait for them.
    """
    if torch.is_grad_enabled() or _is_followed():
        return folded_parameters(host, unit, otherwise)
    own = (getattr(host, name, None) for name in ("weight", "bias"))
    sources = unit.weight, unit.filtered, unit.bias, *own
    statistics = getattr(getattr(host, "running_mean", None), "dtype", None)
    settings = unit.alpha, unit.gain, otherwise, statistics
    known = _KNOWN.get(unit)
    if known is not None and known.settings == settings and _are_equal(known.sources, sources):
        return known.given
    given = folded_parameters(host, unit, otherwise)
    if all(x is None or _is_plain(x) for x in (*sources, *given.values())):
        kept = tuple(None if x is None else x.detach().clone() for x in sources)
        # What it returns of a filter's bias may be that bias, which is trained in place.
        _KNOWN[unit] = _Folded(settings, kept, {k: v.detach().clone() for k, v in given.items()})
    return given


@dataclass(frozen=True)
class _Folded:
    settings: tuple[object, ...]
    sources: tuple[Tensor | None, ...]
    given: dict[str, Tensor]


_KNOWN: weakref.WeakKeyDictionary[PriFU, _Folded] = weakref.WeakKeyDictionary()
_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7


def _is_followed() -> bool:
    """Whether something follows the operations of a forward, which may not ask for values."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, jvp
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx
        or forward_ad._current_level >= 0  # which goes on without gradients
    )


def _are_equal(known: tuple[Tensor | None, ...], now: tuple[Tensor | None, ...]) -> bool:
    for before, value in zip(known, now, strict=True):
        if before is None or value is None:
            if before is not value:
                return False
        elif not (_is_plain(value) and value.dtype == before.dtype and torch.equal(before, value)):
            return False
    return True


def _is_plain(x: Tensor) -> bool:
    """Whether this is a tensor with values of its own in memory: no fake, sharded or traced one."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
