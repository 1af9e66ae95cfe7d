"""The least work a filtered model needs, found by running it: independent of the analysis.

An input channel of a linear map costs nothing if it does not vary over inputs; an output channel
costs nothing if it does not vary or carries no gradient to the model's output.
"""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED)


def least_share(model, shape, batch=4, seed=0):
    """Return the least share of the model's multiply-accumulates that cannot be saved.

    Args:
        model: filtered, fp64, eval mode.
        shape: of one input, (C, H, W).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    # Faint and harsh ones, since an activation that is off for all of a few images may yet be on.
    contrast = 10 ** torch.linspace(-0.5, 1.5, batch).reshape(-1, *[1] * len(shape))
    x = (contrast * images(batch, *shape, generator)).double().requires_grad_()
    seen = {}

    def remember(module, inputs, output):
        result = output[0] if isinstance(output, tuple) else output
        if result.requires_grad:
            result.retain_grad()
        seen.setdefault(module, []).append((inputs[0].detach(), result))

    handles = [
        module.register_forward_hook(remember)
        for module in model.modules()
        if isinstance(module, (*LINEAR, nn.MultiheadAttention))
    ]
    out = model(x)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    for handle in handles:
        handle.remove()
    total = macs(model, (batch, *shape))
    saved = sum(_saved(module, *call) for module, calls in seen.items() for call in calls)
    return (total - saved) / total


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


def _saved(module, x, out):
    if isinstance(module, nn.MultiheadAttention):
        varies = _varies(x, -1).double().mean()
        needed = _needed(out, -1).double().mean()
        tokens, width = x.shape[0] * x.shape[1], x.shape[-1]
        return tokens * width * width * (3 * (1 - varies) + (1 - needed))
    dim = -1 if isinstance(module, nn.Linear) else 1
    groups = getattr(module, "groups", 1)
    varies = _varies(x, dim).double().reshape(groups, -1)
    needed = (_needed(out, dim) & _varies(out.detach(), dim)).double().reshape(groups, -1)
    pairs = (varies.sum(1) * needed.sum(1)).sum()
    taps = module.weight[0, 0].numel()
    counted = x if isinstance(module, TRANSPOSED) else out  # each input place meets every tap
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
