"""Which operations work on each element alone."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prifu_plugin.errors import ConfigError
from prifu_plugin.graph.capture import register_leaf

PRODUCTS = {operator.mul, torch.mul, torch.multiply, "mul", "multiply"}
SCALINGS = {*PRODUCTS, operator.truediv, torch.div, torch.true_divide, "div", "true_divide"}
SUMS = {operator.add, torch.add, "add"}
FILLS = {torch.zeros_like, torch.ones_like, torch.full_like}
"""What takes only the shape of its operand."""

POINTWISE: set[Any] = {
    *PRODUCTS,
    *SUMS,
    *FILLS,
    *(operator.sub, operator.truediv, operator.neg, operator.pow),
    *(torch.sub, torch.div, torch.true_divide, torch.neg, torch.pow, torch.square, torch.abs),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.sqrt, torch.rsqrt),
    *(torch.clamp, torch.clip, torch.erf, torch.sin, torch.cos, torch.maximum, torch.minimum),
    *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.logsigmoid, F.softsign),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *("sub", "div", "true_divide", "neg", "pow", "square", "abs", "relu", "sigmoid", "tanh"),
    *("exp", "log", "sqrt", "rsqrt", "clamp", "clip", "erf", "float", "double", "half", "to"),
    *("type", "clone", "detach", "nan_to_num", torch.nan_to_num),
    *("clamp_min", "clamp_max", torch.clamp_min, torch.clamp_max, F.threshold, torch.threshold),
    *("log1p", "expm1", "lerp", "addcmul", "addcdiv", "maximum", "minimum", "hypot", "rsub"),
    *(torch.log1p, torch.expm1, torch.lerp, torch.addcmul, torch.addcdiv, torch.rsub),
}
POINTWISE_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU),
    *(nn.Softplus, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh),
    *(nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold),
)


_REGISTERED_MODULES: list[type[nn.Module]] = []


def register_pointwise(target: Any) -> Any:
    """Declare that an operation works on each element alone; usable as a decorator.

    Prune then passes channels through it, and knows what it makes of constants by running it. Its
    result may depend on nothing but the operands at the same place, with broadcasting, and on
    parameters of one number each.

    Args:
        target: a module class, a function, or the name of a tensor method. A module class becomes
            one call for every capture.

    Returns:
        The target.

    Raises:
        ConfigError: for something else.

    Example:
        >>> @register_pointwise
        ... class Snake(nn.Module):
        ...     def forward(self, x):
        ...         return x + torch.sin(x) ** 2
        >>> Snake in _REGISTERED_MODULES
        True
    """
    if isinstance(target, type) and issubclass(target, nn.Module):
        register_leaf(target)
        if target not in _REGISTERED_MODULES:
            _REGISTERED_MODULES.append(target)
    elif isinstance(target, str) or (callable(target) and not isinstance(target, nn.Module | type)):
        POINTWISE.add(target)
    else:
        raise ConfigError(
            f"{target!r} is no module class, function or name of a tensor method: register the "
            "class of a module, not an instance."
        )
    return target


def is_pointwise_module(module: nn.Module) -> bool:
    """Whether a layer works on each element alone, with no parameter for each channel."""
    known = isinstance(module, (*POINTWISE_MODULES, *_REGISTERED_MODULES))
    return known or (isinstance(module, nn.PReLU) and module.num_parameters == 1)
