"""What counts as a normalization layer, and where its channels are."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prifu_plugin.errors import ConfigError
from prifu_plugin.names import CHILD


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """What wrap and prune need to know of a normalization class.

    Attributes:
        dim: channel dimension of the output.
        folds: the output is normalized(x) * weight + bias with the attributes of those names,
            perhaps followed by an activation; a scale can then be folded into them for the call.
        folds_bias: the class has such a bias.
        running: with running statistics in eval mode, each channel is an affine map of its own.
        centers: whether a mean over other values is subtracted. If not (RMSNorm), a channel of
            zeros stays zero whatever the other channels hold.
        fused: an activation follows inside the module.
        channels: name of the attribute that tells how many channels there are; "" for the usual.
        image_dim: channel dimension of an output of four dimensions or more, where it is another:
            some norms take tokens (N, L, C) and images (N, C, H, W).
    """

    dim: int
    image_dim: int | None = None
    folds: bool = True
    folds_bias: bool = True
    running: bool = False
    centers: bool = True
    fused: bool = False
    channels: str = ""

    def dim_at(self, ndim: int) -> int:
        """Return the channel dimension of an output of `ndim` dimensions."""
        return self.dim if self.image_dim is None or ndim < 4 else self.image_dim


_BATCH = NormSpec(dim=1, running=True)
_BATCH_ACT = NormSpec(dim=1, running=True, fused=True)
_NCHW = NormSpec(dim=1)
_NCHW_ACT = NormSpec(dim=1, fused=True)
_LAST = NormSpec(dim=-1)
_LAST_ACT = NormSpec(dim=-1, fused=True)
_LAST_RMS = NormSpec(dim=-1, folds_bias=False, centers=False)
_LAST_RMS_ACT = NormSpec(dim=-1, folds_bias=False, centers=False, fused=True)
_NCHW_RMS = NormSpec(dim=1, folds_bias=False, centers=False)
_NCHW_RMS_ACT = NormSpec(dim=1, folds_bias=False, centers=False, fused=True)

_TORCH = {
    "torch.nn.modules.batchnorm.": dict.fromkeys(
        ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"], _BATCH
    ),
    "torch.nn.modules.instancenorm.": dict.fromkeys(
        ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"], _NCHW
    ),
    "torch.nn.modules.normalization.": {
        "LayerNorm": _LAST,
        "RMSNorm": _LAST_RMS,
        "GroupNorm": _NCHW,
    },
    "torchvision.ops.misc.": {"FrozenBatchNorm2d": _BATCH},
    "torchvision.models.convnext.": {"LayerNorm2d": _NCHW},
}
_TIMM = {
    "timm.layers.norm.": {
        "GroupNorm": _NCHW,
        "GroupNorm1": _NCHW,
        "LayerNorm": _LAST,
        "LayerNormFp32": _LAST,
        "LayerNorm2d": _NCHW,
        "LayerNorm2dFp32": _NCHW,
        "LayerNormExp2d": _NCHW,
        **dict.fromkeys(["RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32"], _LAST_RMS),
        **dict.fromkeys(
            ["RmsNorm2d", "RmsNorm2dFp32", "SimpleNorm2d", "SimpleNorm2dFp32"], _NCHW_RMS
        ),
    },
    "timm.layers.norm_act.": {
        **dict.fromkeys(["BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"], _BATCH_ACT),
        **dict.fromkeys(
            ["GroupNormAct", "GroupNorm1Act", "LayerNormAct2d", "LayerNormAct2dFp32"], _NCHW_ACT
        ),
        **dict.fromkeys(["LayerNormAct", "LayerNormActFp32"], _LAST_ACT),
        **dict.fromkeys(["RmsNormAct", "RmsNormActFp32"], _LAST_RMS_ACT),
        **dict.fromkeys(["RmsNormAct2d", "RmsNormAct2dFp32"], _NCHW_RMS_ACT),
    },
    "timm.layers.evo_norm.": dict.fromkeys(
        [f"EvoNorm2d{kind}" for kind in ("B0", "B1", "B2", "S0", "S0a", "S1", "S1a", "S2", "S2a")],
        _NCHW_ACT,
    ),
    "timm.layers.filter_response_norm.": dict.fromkeys(
        ["FilterResponseNormTlu2d", "FilterResponseNormAct2d"], _NCHW_ACT
    ),
    "timm.layers.grn.": {"GlobalResponseNorm": NormSpec(dim=-1, folds=False)},
}

# Keyed by qualified name, so that timm and torchvision need not be imported, or installed.
_REGISTRY: dict[str, NormSpec] = {
    prefix + name: spec
    for table in (_TORCH, _TIMM)
    for prefix, names in table.items()
    for name, spec in names.items()
}


def dim_of_name(name: str) -> int | None:
    """Return the channel dimension of a class by its bare name, as scripted modules keep it.

    Example:
        >>> dim_of_name("LayerNorm"), dim_of_name("Conv2d")
        (-1, None)
    """
    specs = (spec for key, spec in _REGISTRY.items() if key.rpartition(".")[2] == name)
    return next((spec.dim for spec in specs), None)


_BY_NAME = {"batch_norm": 1, "instance_norm": 1, "group_norm": 1, "layer_norm": -1, "rms_norm": -1}


def _spellings(name: str) -> tuple[Any, ...]:
    """Return the functions of torch that have a name, and its operators."""
    operator = getattr(torch.ops.aten, name)
    overloads = [getattr(operator, overload) for overload in operator.overloads()]
    return (
        *(getattr(home, name) for home in (F, torch) if hasattr(home, name)),
        operator,
        *overloads,
    )


FUNCTIONAL_DIMS: dict[Callable[..., Any] | str, int] = {
    function: dim for name, dim in _BY_NAME.items() for function in _spellings(name)
}
"""Functional normalizations and their channel dimensions."""

DIMS_WITH_STATISTICS: dict[Callable[..., Any] | str, int] = {
    function: _BY_NAME[name]
    for name in ("batch_norm", "group_norm", "layer_norm")
    for function in _spellings(f"native_{name}")
}
"""The same of those that return a tuple: what they made of their input, and its statistics."""


def register_norm(cls: type[nn.Module], *, dim: int, channels: str = "") -> type[nn.Module]:
    """Make `wrap` put filters behind a normalization layer of your own.

    Classes that derive from one of torch, timm or torchvision are known already. Of the inside of
    a registered class nothing is assumed: the filter multiplies its output, and `prune` keeps its
    input whole.

    Args:
        cls: a class of modules; instances of subclasses count too.
        dim: channel dimension of the output, 1 for (N, C, ...), -1 for (..., C).
        channels: attribute with the number of channels; by default num_features, num_channels,
            normalized_shape or the size of weight are looked for.

    Returns:
        The class.

    Raises:
        ConfigError: if it is no class of modules, or dim is 0, the batch.

    Example:
        >>> class Unit(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.width = width
        ...     def forward(self, x):
        ...         return x / x.norm(dim=1, keepdim=True)
        >>> _ = register_norm(Unit, dim=1, channels="width")
        >>> import prifu_plugin as prifu
        >>> [site.path for site in prifu.sites(nn.Sequential(nn.Linear(4, 8), Unit(8)))]
        ['1']
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"register_norm({cls!r}): pass a class of modules, not an instance.")
    if isinstance(dim, bool) or not isinstance(dim, int) or dim == 0:
        raise ConfigError(
            f"dim={dim!r}: pass the channel dimension, 1 for (N, C, ...), -1 for (..., C); 0 is "
            "the batch."
        )
    _REGISTRY[_name(cls)] = NormSpec(dim=dim, folds=False, channels=channels)
    return cls


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as it was before a filter was attached.

    What torch has derived from that since, to parametrize a weight, is derived from it here.
    """
    cls = type(module)
    own: type[nn.Module] = getattr(cls, "_prifu_base", cls)
    return own if own is cls or "_prifu_base" in vars(cls) else _derived(cls)


_DERIVED: weakref.WeakKeyDictionary[type, tuple[dict[str, Any], type]] = weakref.WeakKeyDictionary()


def _derived(cls: type) -> type[nn.Module]:
    """Return a class like one that is derived from a hosting one, without the filter."""
    if "_prifu_base" in vars(cls):
        return vars(cls)["_prifu_base"]  # type: ignore[no-any-return]
    members = own_members(cls)
    known = _DERIVED.get(cls)
    if known is None or known[0] != members:  # a weight more or less is computed than before
        bases = (_derived(b) if hasattr(b, "_prifu_base") else b for b in cls.__bases__)
        known = _DERIVED[cls] = members, type(cls.__name__, tuple(bases), members)
    return known[1]


def beneath(host: nn.Module, hosting: Callable[[type[nn.Module]], type]) -> type[nn.Module]:
    """Return a hosting class of a module; what torch derived to parametrize it stays outermost.

    Args:
        host: with a filter or without.
        hosting: base class -> class whose forward passes through the filter.
    """
    base = base_class(host)
    if "parametrizations" not in host._modules:
        return hosting(base)
    inner = hosting(base.__bases__[0])  # what torch.nn.utils.parametrize has derived from
    return type(base.__name__, (inner,), own_members(base))


def own_members(cls: type) -> dict[str, Any]:
    """Return what the body of a class defines, to make another one like it."""
    return {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}


def norm_spec(module: nn.Module) -> NormSpec | None:
    """Return the spec of a normalization module, or None for any other.

    A subclass that overrides forward is still a normalization layer, but nothing is assumed of
    its inside: the filter then multiplies its output.

    Example:
        >>> norm_spec(nn.LayerNorm(4)).dim, norm_spec(nn.Linear(2, 2))
        (-1, None)
    """
    cls = base_class(module)
    for ancestor in cls.__mro__:
        spec = _REGISTRY.get(_name(ancestor))
        if spec is None:
            continue
        if getattr(ancestor, "forward", None) is not cls.forward:
            dim, image_dim = _dims_by_trial(module, spec.dim)
            return NormSpec(dim=dim, image_dim=image_dim, folds=False)
        return _for_instance(module, spec)
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer; cheap, and safe while a model is traced."""
    mro = base_class(module).__mro__
    return any(_name(cls) in _REGISTRY for cls in mro)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def num_channels(module: nn.Module) -> int | None:
    """Return the number of channels of a normalization module, if its attributes tell."""
    told = [
        _REGISTRY[_name(c)].channels for c in base_class(module).__mro__ if _name(c) in _REGISTRY
    ]
    if told and told[0]:
        return int(getattr(module, told[0]))
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        return int(shape[0])
    for name in ("num_features", "num_channels"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    weight = getattr(module, "weight", None)
    return int(weight.numel()) if isinstance(weight, torch.Tensor) else None


_TRIED: weakref.WeakKeyDictionary[nn.Module, tuple[int, int | None]] = weakref.WeakKeyDictionary()


def _dims_by_trial(module: nn.Module, default: int) -> tuple[int, int | None]:
    """Find the channel dimensions of a subclass with a forward of its own, by what it takes.

    A LayerNorm that permutes takes (N, C, H, W), and not (N, H, W, C); many exist, and some have a
    setting for it, or permute inputs of four dimensions only.
    """
    channels = num_channels(module)
    if channels is None:
        return default, None
    if module not in _TRIED:
        others = [size for size in (5, 7, 11) if size != channels]
        tokens = _dim_taken(module, channels, others[:1])
        images = _dim_taken(module, channels, others[:2])
        first = next((dim for dim in (tokens, images) if dim is not None), default)
        _TRIED[module] = (first, None if images in (None, first) else images)
    return _TRIED[module]


def _dim_taken(module: nn.Module, channels: int, others: list[int]) -> int | None:
    """Return which dimension must be the channels for a module to take a tensor, if one must."""
    taken = [dim for dim in (1, -1) if _keeps_shape(module, channels, others, dim)]
    return taken[0] if len(taken) == 1 else None


def _keeps_shape(module: nn.Module, channels: int, others: list[int], dim: int) -> bool:
    shape = [2, *others, channels] if dim == -1 else [2, channels, *others]
    try:
        twin: Any = copy.deepcopy(module).eval()
        twin.__class__ = base_class(module)
        twin._modules.pop(CHILD, None)
        first = next(iter([*twin.parameters(), *twin.buffers()]), torch.zeros(()))
        with torch.no_grad():
            return bool(twin(torch.zeros(shape).to(first)).shape == torch.Size(shape))
    except Exception:  # noqa: BLE001 - a refusal is the answer
        return False


def _for_instance(module: Any, spec: NormSpec) -> NormSpec:
    shape = getattr(module, "normalized_shape", None)
    if shape is not None and len(shape) > 1:
        return NormSpec(dim=-len(shape), folds=False, fused=spec.fused)
    if spec.running and getattr(module, "running_mean", None) is None:
        return NormSpec(dim=spec.dim, fused=spec.fused)
    if not spec.folds and hasattr(module, "channel_dim"):
        return NormSpec(dim=int(module.channel_dim), folds=False)
    return spec
