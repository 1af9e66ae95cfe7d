"""How a filter lives in a model: as a child of the module it follows.

The host keeps its place, its parameters' names and every isinstance; only its class becomes a
subclass with the same name whose forward passes through the child. docs/design.md compares this
with the other ways.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import OrderError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.folding import folds, remembered_parameters
from prifu_plugin.graph.norms import base_class, beneath, norm_spec
from prifu_plugin.names import CHILD


def attach(host: nn.Module, unit: PriFU | CutFilter) -> None:
    """Make a module pass through a filter, in place.

    Args:
        host: a normalization module, or with a `CutFilter` any module that returns a tensor.
        unit: the filter, which becomes the child named "prifu".
    """
    host.add_module(CHILD, unit)
    kind = _kind(host, unit)
    host.__class__ = beneath(host, lambda base: _hosting_class(base, kind))


def detach(host: nn.Module) -> None:
    """Undo `attach`, in place; a scale that the filter had absorbed goes back to the host."""
    unit = host._modules[CHILD]
    if isinstance(unit, PriFU) and unit.holds_scale:
        _give_back(host, unit)
    host.__class__ = base_class(host)
    del host._modules[CHILD]


def _give_back(host: nn.Module, unit: PriFU) -> None:
    if "parametrizations" in host._modules:
        raise OrderError(
            f"The filter of this {base_class(host).__name__} has absorbed a scale that is computed "
            "since. Remove its parametrizations first "
            "(torch.nn.utils.parametrize.remove_parametrizations)."
        )
    scale, shift = host.get_parameter("weight"), getattr(host, "bias", None)
    with torch.no_grad():
        scale.mul_(unit.weight * unit.gain)
        scale.requires_grad_(unit.frees_scale)
        if shift is not None and unit.bias is not None:
            shift.copy_(unit.bias)
            shift.requires_grad_(unit.frees_scale)


def keep_fixed(host: nn.Module, unit: PriFU) -> None:
    """Let the scale and shift of a host stay as they are, while its filter has taken them over."""
    freed = unit.__dict__.pop("lets_go", None)
    if unit.holds_scale or freed is not None:
        for name in ("weight", "bias"):
            own = host._parameters.get(name)
            if own is not None:
                own.requires_grad_(not unit.holds_scale and bool(freed))
                if unit.holds_scale:
                    own.grad = None  # an optimizer's momentum would move it on


def is_host(module: nn.Module) -> bool:
    """Whether a filter is attached to this module."""
    return hasattr(type(module), "_prifu_base")


def is_folded(host: nn.Module) -> bool:
    """Whether a host's filter acts through its affine parameters, rather than on its output."""
    # A parametrized layer computes its weight in a property, which would hide the folded one.
    computed = "parametrizations" in host._modules
    return getattr(type(host), "_prifu_kind", "") == "folded" and not computed


def filter_of(host: nn.Module) -> PriFU | CutFilter:
    """Return the filter of a host."""
    unit = host._modules[CHILD]
    assert isinstance(unit, PriFU | CutFilter)
    return unit


def _kind(host: nn.Module, unit: PriFU | CutFilter) -> str:
    spec = norm_spec(host)
    computed = "parametrizations" in host._modules
    if isinstance(unit, PriFU) and spec is not None and folds(spec, unit) and not computed:
        return "folded"
    return "output"


def _folded_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if "parametrizations" in self._modules:
        return _output_forward(self, *args, **kwargs)
    unit = filter_of(self)
    assert isinstance(unit, PriFU)
    return run_with(self, remembered_parameters(self, unit, _type_of(args)), *args, **kwargs)


def _type_of(args: tuple[Any, ...]) -> torch.dtype | None:
    """Return the type that a layer without parameters computes in; autocast has its own."""
    if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return None
    return None if torch.is_autocast_enabled(args[0].device.type) else args[0].dtype


def run_with(host: nn.Module, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Call what a host is without its filter, with other parameters for this call."""
    # A shallow twin of the base class, so that super() in its forward works; buffers, children
    # and everything else are shared.
    base = base_class(host)
    twin = object.__new__(base)
    members = host.__dict__.copy()
    members["_parameters"] = {**host._parameters, **parameters}
    members.pop("weight", None)
    members.pop("bias", None)
    before = members.copy()
    object.__setattr__(twin, "__dict__", members)  # not Module's, which looks into every value
    result = base.forward(twin, *args, **kwargs)
    _keep(host, before, members)
    return result


def _keep(host: nn.Module, before: dict[str, Any], members: dict[str, Any]) -> None:
    """Do to a host what a forward did to the twin it ran on, such as counting its calls."""
    same = list(before) == list(members)
    if same and all(map(operator.is_, before.values(), members.values())):
        return
    for name in before.keys() | members.keys():
        if name not in members:
            host.__dict__.pop(name, None)
        elif name not in before or members[name] is not before[name]:
            host.__dict__[name] = members[name]


def _output_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # The twin lacks the filter, which a container would run as one of its own children.
    base = base_class(self)
    twin = object.__new__(base)
    children = {name: child for name, child in self._modules.items() if name != CHILD}
    twin.__dict__ = {**self.__dict__, "_modules": children}
    before = dict(twin.__dict__)
    result = base.forward(twin, *args, **kwargs)
    _keep(self, before, twin.__dict__)
    return filter_of(self)(result)


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle by the original class, since the hosting one has no name to be found by."""
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _rebuild, (base_class(self), type(self).__dict__["_prifu_kind"]), state


def _rebuild(base: type[nn.Module], kind: str) -> nn.Module:
    cls = _hosting_class(base, kind)
    module = cls.__new__(cls)
    assert isinstance(module, nn.Module)
    return module


_CLASSES: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _hosting_class(base: type[nn.Module], kind: str) -> type[nn.Module]:
    if (base, kind) not in _CLASSES:
        _CLASSES[base, kind] = _make_hosting_class(base, kind)
    return _CLASSES[base, kind]


def _make_hosting_class(base: type[nn.Module], kind: str) -> type[nn.Module]:
    members = {
        "forward": _folded_forward if kind == "folded" else _output_forward,
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_prifu_base": base,
        "_prifu_kind": kind,
    }
    return type(base.__name__, (base,), members)


def _keep_hosting(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Rehost a filter whose norm was replaced, as SyncBatchNorm conversion does."""
    arrived = name == CHILD and isinstance(submodule, PriFU) and not is_host(module)
    if arrived and norm_spec(module) is not None:
        assert isinstance(submodule, PriFU)
        module.__class__ = _hosting_class(type(module), _kind(module, submodule))


register_module_module_registration_hook(_keep_hosting)
