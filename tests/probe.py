"""The least work a filtered model needs, found by running it: independent of the analysis.

An input channel of a linear map costs nothing if it does not vary over inputs; an output channel
costs nothing if it does not vary or carries no gradient to the model's output.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d, *TRANSPOSED)


RESTING = {
    *(F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_),
    *(F.relu6, F.hardtanh, F.hardtanh_, F.hardswish, F.silu, F.gelu, F.elu, F.hardsigmoid),
    *(torch.sigmoid, torch.sigmoid_, torch.Tensor.sigmoid, torch.Tensor.sigmoid_, F.sigmoid),
}
"""What gives one value for many: 0 below 0, or what is as good as its limit."""


def least_share(model, shape, batch=4, seed=0, awake=False):
    """Return the least share of the model's multiply-accumulates that cannot be saved.

    Args:
        model: filtered, fp64, eval mode.
        shape: of one input, (C, H, W).
        batch: how many images are tried.
        seed: of the images.
        awake: let no activation rest: asinh, which is flat nowhere, takes their place. What they
            keep at one value for all images that are tried, they need not keep for others.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    # Faint and harsh ones, since an activation that is off for all of a few images may yet be on.
    contrast = 10 ** torch.linspace(-0.5, 1.5, batch).reshape(-1, *[1] * len(shape))
    x = (contrast * images(batch, *shape, generator)).double().requires_grad_()
    calls = []

    def remember(layer, inputs, output):
        output[0].retain_grad()
        calls.append((layer, inputs[0].detach(), output[0], None, 1))

    hooks = [
        layer.register_forward_hook(remember)
        for layer in model.modules()
        if isinstance(layer, nn.MultiheadAttention)
    ]
    with Remembering(calls, awake):
        out = model(x)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    for hook in hooks:
        hook.remove()
    total = macs(model, (batch, *shape))
    return (total - sum(_saved(*call) for call in calls)) / total


class Remembering(TorchFunctionMode):
    """Note what linear maps are called with, by layers or as functions: (which, x, out, w, groups).

    Those inside nn.MultiheadAttention are not seen, since a mode is off inside of what it sees.
    """

    def __init__(self, calls, awake=False):
        super().__init__()
        self.calls = calls
        self.awake = awake

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.awake and func in RESTING:
            return torch.asinh((*args, *(kwargs or {}).values())[0])
        out = func(*args, **(kwargs or {}))
        if (func is F.linear or func in CONVOLUTIONS) and out.requires_grad:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            groups = args[6] if len(args) > 6 else given.get("groups", 1)
            out.retain_grad()
            self.calls.append((func, given["input"].detach(), out, given["weight"], groups))
        return out


def images(batch, channels, height, width, generator):
    """Draw images that differ at every scale, so that a live channel shows itself."""
    x = torch.randn(batch, channels, height, width, generator=generator)
    for size in (1, 3, 8):
        coarse = torch.randn(batch, channels, size, size, generator=generator)
        x = x + nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return x


def macs(model, shape):
    reference = next(model.parameters())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel is not counted
    counting = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting as counter:
        model(torch.zeros(shape).to(reference))
    torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def _saved(function, x, out, weight, groups):
    if isinstance(function, nn.MultiheadAttention):
        varies = _varies(x, -1).double().mean()
        needed = _needed(out, -1).double().mean()
        tokens, width = x.shape[0] * x.shape[1], x.shape[-1]
        return tokens * width * width * (3 * (1 - varies) + (1 - needed))
    dim = -1 if function is F.linear else 1
    varies = _varies(x, dim).double().reshape(groups, -1)
    needed = (_needed(out, dim) & _varies(out.detach(), dim)).double().reshape(groups, -1)
    pairs = (varies.sum(1) * needed.sum(1)).sum()
    taps = weight[0, 0].numel()
    counted = x if function in TRANSPOSED else out  # each input place meets every tap
    places = counted.numel() // counted.shape[dim]
    every = groups * varies.shape[1] * needed.shape[1]
    return float(places * taps * (every - pairs))


def _varies(x, dim):
    spread = _by_channel(x.amax(0) - x.amin(0), dim if dim < 0 else dim - 1)
    return spread > 1e-10 * _by_channel(x.abs().amax(0), dim if dim < 0 else dim - 1)


def _needed(out, dim):
    if out.grad is None:
        return torch.zeros(out.shape[dim], dtype=torch.bool)
    return _by_channel(out.grad.abs(), dim) > 0


def _by_channel(x, dim):
    return x.movedim(dim, 0).reshape(x.shape[dim], -1).amax(1)
