"""Relative Influence: how much the loss depends on what a model computes (Eq. 1, 2, 7 and 8)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from prifu_plugin.arguments import check_callable, check_model
from prifu_plugin.batches import pairs
from prifu_plugin.cut import CutFilter
from prifu_plugin.device import device_of
from prifu_plugin.errors import CaptureError, ConfigError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.folding import folded_parameters
from prifu_plugin.graph.host import filter_of, is_folded, is_host, run_with
from prifu_plugin.graph.insert import filters
from prifu_plugin.graph.norms import norm_spec
from prifu_plugin.graph.state import wrap_state
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.graph.values import check_present
from prifu_plugin.learned import are_right
from prifu_plugin.names import CHILD
from prifu_plugin.ranks import spearman
from prifu_plugin.sharded import check_unsharded

Loss = Callable[[Any, Tensor], Tensor]
"""Model output and target -> losses of the samples, (N,)."""


@dataclass(frozen=True)
class LayerRelevance:
    """AvgRI of the channels one filter stands behind.

    Attributes:
        path: what the filter follows.
        weight: W, (C,), fp64.
        avgri: AvgRI of X, the filter's input, (C,), fp64: the mean of abs(dl/dX) over samples and
            positions.
        after: mean of abs(dl/dY) of its output; avgri = abs(scale) * after (Eq. 8).
    """

    path: str
    weight: Tensor
    avgri: Tensor
    after: Tensor

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of W and AvgRI over the channels; NaN if either is flat."""
        return spearman(self.weight, self.avgri)


@dataclass(frozen=True)
class Relevance:
    """AvgRI of every filter's channels and of the input's.

    Attributes:
        layers: by path.
        inputs: AvgRI of the input channels, (C,), fp64 (the paper's Fig. 7).
        samples: how many there were.
    """

    layers: dict[str, LayerRelevance]
    inputs: Tensor
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "samples": self.samples,
            "inputs": self.inputs.tolist(),
            "layers": {
                path: {
                    "weight": layer.weight.tolist(),
                    "avgri": layer.avgri.tolist(),
                    "correlation": layer.correlation,
                }
                for path, layer in self.layers.items()
            },
        }


def relevance(
    model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], loss: Loss | None = None
) -> Relevance:
    """Measure AvgRI (Eq. 2) for every filter of a model and for its input, in one pass over data.

    In eval mode the samples do not depend on each other, so one backward pass of the summed losses
    gives the gradient of each; absolute values are taken before any average.

    Args:
        model: a wrapped model; it is not changed.
        data: batches (x, target), x floating-point (N, C, ...).
        loss: gives the loss of each sample, (N,); by default cross-entropy of logits (N, classes),
            or of one logit of two classes.

    Returns:
        AvgRI by filter and by input channel.

    Raises:
        OrderError: if the model is not wrapped.
        ConfigError: if data is empty, or the loss is not one number a sample.

    Example:
        >>> import prifu_plugin as prifu
        >>> net = prifu.wrap(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> found = relevance(net, [(x, y)])
        >>> found.layers["1"].avgri.shape, found.inputs.shape
        (torch.Size([3]), torch.Size([4]))
    """
    wrap_state(model)
    check_present(model)
    check_unsharded(model, "relevance")
    check_callable("loss", loss, "output and target, the losses of the samples (N,)")
    loss = loss or _cross_entropy
    device = device_of(model)
    meters = {path: _Meter(unit.weight.numel()) for path, unit in filters(model).items()}
    inputs: _Meter | None = None
    samples = 0
    with undisturbed(model), ExitStack() as hooks, torch.enable_grad():
        model.eval()
        frozen = [p for p in model.parameters() if p.requires_grad]
        hooks.callback(lambda: [p.requires_grad_(True) for p in frozen])
        for parameter in frozen:
            parameter.requires_grad_(False)  # only gradients of activations are wanted
        for path, module, unit in _places(model):
            hooks.callback(_watch(module, unit, meters[path]).remove)
        count = len(data) if isinstance(data, Sized) else None
        bar = tqdm(pairs(data, device), "relevance", count, leave=False, disable=None)
        for given, target in bar:
            x = _differentiable(given)
            losses = _one_each(loss(model(x), target), len(x))
            (gradient,) = torch.autograd.grad(losses.sum(), x)
            inputs = inputs or _Meter(x.shape[1])
            inputs.add(gradient, 1)
            samples += len(x)
    if inputs is None:
        raise ConfigError("data is empty: pass batches (x, target).")
    layers = {}
    for path, unit in filters(model).items():
        after = meters[path].mean()
        scale = _scale(model, path, unit).detach().double().cpu().abs()
        weight = unit.weight.detach().double().cpu()
        layers[path] = LayerRelevance(path, weight, scale * after, after)
    return Relevance(layers, inputs.mean(), samples)


def influence(model: nn.Module, x: Tensor, target: Tensor, loss: Loss | None = None) -> Tensor:
    """Return the Relative Influence of every input value on the loss (Eq. 1, the paper's Fig. 4).

    Args:
        model: any model, plain or wrapped; run in eval mode and not changed.
        x: floating-point inputs (N, C, ...).
        target: what the loss compares with.
        loss: gives the loss of each sample, (N,); by default cross-entropy of logits (N, classes),
            or of one logit of two classes.

    Returns:
        The absolute gradients, shape, dtype and device of x.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> influence(net, torch.randn(3, 2), torch.tensor([0, 1, 0])).shape
        torch.Size([3, 2])
    """
    check_model(model)
    check_present(model)
    check_callable("loss", loss, "output and target, the losses of the samples (N,)")
    if not isinstance(x, Tensor) or not isinstance(target, Tensor):
        kinds = f"{type(x).__name__} and {type(target).__name__}"
        raise ConfigError(f"x and target are {kinds}: pass tensors.")
    with undisturbed(model), torch.enable_grad():
        model.eval()
        device = device_of(model)
        moved = _differentiable(x.to(device))
        losses = (loss or _cross_entropy)(model(moved), target.to(device))
        losses = _one_each(losses, len(moved))
        (gradient,) = torch.autograd.grad(losses.sum(), moved)
    return gradient.abs().to(x.device)


def _one_each(losses: Tensor, count: int) -> Tensor:
    if losses.shape != (count,):
        raise ConfigError(
            f"loss returns {tuple(losses.shape)} for {count} samples: return one loss a sample, as "
            "torch.nn.functional.cross_entropy(..., reduction='none') does."
        )
    return losses


def _differentiable(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ConfigError(
            f"Inputs are {x.dtype}: influence is a gradient, which integers do not have. "
            "Measure the part of the model behind its embedding."
        )
    return x.detach().requires_grad_()


def _cross_entropy(output: Any, target: Tensor) -> Tensor:
    soft = isinstance(output, Tensor) and target.is_floating_point()
    if not soft or target.shape != output.shape:
        are_right(output, target)  # or it says what does not fit
    if output.ndim == 1 or output.shape[1] == 1:
        truth = target.to(output.dtype).flatten()
        return F.binary_cross_entropy_with_logits(output.flatten(), truth, reduction="none")
    return F.cross_entropy(output, target, reduction="none")


class _Meter:
    """Mean absolute gradient per channel, over samples and positions."""

    def __init__(self, channels: int) -> None:
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.count = 0

    def add(self, gradient: Tensor, dim: int) -> None:
        sizes = gradient.detach().abs()
        sizes = sizes if sizes.dtype == torch.float64 else sizes.float()
        inner = [d for d in range(1, sizes.ndim) if d != dim % sizes.ndim]
        lines = sizes.sum(inner) if inner else sizes  # a sample's positions, then samples in fp64
        self.total += lines.double().sum(0).cpu()
        self.count += sizes.numel() // lines.shape[1]

    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)


def _places(model: nn.Module) -> list[tuple[str, nn.Module, PriFU]]:
    """Return (path, module whose output is Y, filter): the host, or the filter that it calls."""
    found, modules = [], dict(model.named_modules())
    for path, unit in filters(model).items():
        owner = modules.get(path)
        place: nn.Module = unit
        if owner is not None and is_host(owner):
            inner = filter_of(owner)
            called = isinstance(inner, CutFilter) or is_folded(owner)
            place = (inner if isinstance(inner, CutFilter) else owner) if called else unit
        found.append((path, place, unit))
    return found


def _watch(module: nn.Module, unit: PriFU, meter: _Meter) -> Any:
    """Note the gradient of Y: what a module returns, or what its fused activation takes."""

    def note(y: Tensor, slope: Tensor | float = 1.0) -> None:
        if y.requires_grad:
            y.register_hook(lambda gradient: meter.add(gradient * slope, unit.dim_at(y.ndim)))

    spec = norm_spec(module)
    inside = [child for name, child in module._modules.items() if child and name != CHILD]
    if spec is None or not spec.fused or not is_folded(module):
        return module.register_forward_hook(lambda _, args, y: note(y))
    if inside:  # the first takes Y
        return inside[0].register_forward_pre_hook(lambda _, args: note(args[0]))
    if "bias" in module._parameters:
        return module.register_forward_hook(lambda _, args, y: note(y, _slope(module, unit, args)))
    raise CaptureError(
        f"The {type(module).__name__} at '{unit.path}' has an activation inside, which keeps what "
        "the filter puts out to itself. Leave it out of the filters with exclude=."
    )


def _slope(module: nn.Module, unit: PriFU, args: tuple[Any, ...]) -> Tensor:
    """Return the derivative of a fused activation at Y, to which the shift of the norm is added."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of forward derivatives
        folded = folded_parameters(module, unit)
        shift = folded["bias"]
        given = [x.detach() for x in args]

        def run(bias: Tensor) -> Tensor:
            y: Tensor = run_with(module, {**folded, "bias": bias}, *given)
            return y

        slope: Tensor = torch.func.jvp(run, (shift,), (torch.ones_like(shift),))[1]
        return slope


def _scale(model: nn.Module, path: str, unit: PriFU) -> Tensor:
    """Return dY/dX of a filter; on the uploaded tensor, that of standardizing and restoring."""
    owner = dict(model.named_modules()).get(path)
    cut = filter_of(owner) if owner is not None and is_host(owner) else None
    return cut.affine()[0] if isinstance(cut, CutFilter) else unit.scale()
