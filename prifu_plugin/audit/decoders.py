"""Decoders: from uploads to images, by least squares and by networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prifu_plugin.audit.least_squares import least_squares, with_one
from prifu_plugin.audit.preparation import (
    WIDE,
    as_map,
    channel_dims,
    is_spatial,
    per_pixel,
    standardize,
    whiten,
)
from prifu_plugin.audit.similarity import LOSSES, Similarity, psnr, similarity
from prifu_plugin.device import seeded

Pair = tuple[Tensor, Tensor]
"""Uploads (N, ...) and the images they were made of, (N, C, H, W) in [0, 1]."""


def decoded(
    train: Pair,
    choose: Pair,
    test: Pair,
    *,
    losses: Sequence[str],
    repeated: Sequence[Tensor] | None,
    seed: int,
    steps: int,
    device: torch.device,
) -> tuple[dict[str, Similarity], Tensor]:
    """Attack with every decoder.

    Returns:
        What each made of the test uploads, by name, and the images of the one that was best on
        images to choose by.
    """
    (z, images), (z_choosing, known), (z_test, truth) = train, choose, test
    linear = z[0].numel() <= WIDE and z[0].numel() * images[0].numel() <= MOST_WEIGHTS
    names = [LINEAR, *losses] if linear else list(losses)
    attacks = [(name, name, (z, z_choosing, z_test)) for name in names]
    if repeated is not None:
        means = (repeated[0], repeated[1], repeated[2])
        attacks += [
            (f"{name}, mean of repeated queries", name, means) for name in names[: 1 + linear]
        ]
    found: dict[str, Similarity] = {}
    best, highest = truth, -math.inf
    for label, name, seen in tqdm(attacks, desc="decoders", leave=False, disable=None):
        parts = (seen[0], images), (seen[1], known)
        if name == LINEAR:
            decode = linear_decoder(*parts)
        else:
            decode = trained_decoder(*parts, LOSSES[name], seed, steps, device)
        made = decode(seen[2])
        found[label] = similarity(made, truth)
        value = psnr(decode(seen[1]), known)
        if value > highest:
            best, highest = made, value
    return found, best


LINEAR = "least squares"
"""The decoder that needs no training, and few images."""
MOST_WEIGHTS = 30_000_000
"""Of that decoder: what is linear in larger uploads is left to convolutions."""


def linear_decoder(
    train: tuple[Tensor, Tensor], choose: tuple[Tensor, Tensor]
) -> Callable[[Tensor], Tensor]:
    """Fit a linear map from whitened uploads to images, with the best of five penalties."""
    (z, images), shape = train, train[1].shape[1:]
    prepare = _vectors(z)
    fits = least_squares(prepare(z), images.flatten(1).double())
    known = with_one(prepare(choose[0]))
    wanted = choose[1].flatten(1).double()
    best = min(fits, key=lambda weight: float((known @ weight - wanted).square().mean()))
    return lambda asked: (with_one(prepare(asked)) @ best).float().unflatten(1, shape)


def trained_decoder(
    train: tuple[Tensor, Tensor],
    choose: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int,
    steps: int,
    device: torch.device,
) -> Callable[[Tensor], Tensor]:
    """Train a decoder from whitened vectors or standardized maps to images.

    Of its training, the moment counts at which it was best on images to choose by.
    """
    z, images = train
    prepare = _per_channel(z) if is_spatial(z) else _vectors(z)
    x = prepare(z)
    if not x[0].numel():  # constant uploads: the mean image is all there is to know
        return lambda asked: images.mean(0).expand(len(asked), -1, -1, -1)
    with seeded(seed, device), torch.enable_grad():
        net = decoder(x.shape[1:], tuple(images.shape[1:])).to(device, torch.float32)
        size = min(64, len(x))
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        best: tuple[float, dict[str, Tensor]] = (-math.inf, {})
        for step in range(1, steps + 1):
            net.train()
            batch = torch.randperm(len(x))[:size]
            optimizer.zero_grad()
            loss(net(x[batch].to(device)), images[batch].to(device)).backward()
            optimizer.step()
            schedule.step()
            if step % max(1, steps // LOOKS) == 0 or step == steps:
                value = psnr(_decoded(net, prepare(choose[0]), device), choose[1])
                if value > best[0]:
                    best = value, {key: value.clone() for key, value in net.state_dict().items()}
        net.load_state_dict(best[1] or net.state_dict())
    return lambda asked: _decoded(net, prepare(asked), device)


LOOKS = 10
"""How often the training of a decoder is judged: with few images it soon learns them by heart."""


def _decoded(net: nn.Module, x: Tensor, device: torch.device) -> Tensor:
    net.eval()
    with torch.no_grad():
        return torch.cat([net(part.to(device)).cpu() for part in x.split(250)])


def decoder(shape: torch.Size, image: tuple[int, ...]) -> nn.Module:
    """Build a decoder that doubles a map, the given one or an eighth of the image, to its size.

    Args:
        shape: of one upload, (C,) or (C, H, W); (C, T, 1) are tokens.
        image: of one image, (C, H, W); what is decoded is in [0, 1].
    """
    channels, height, width = image
    start = shape[1:] if len(shape) == 3 else (-(-height // 8), -(-width // 8))
    width_in = shape[0] if len(shape) == 3 else 64
    layers: list[nn.Module] = []
    if len(shape) == 3 and shape[1] > shape[2] == 1:  # tokens, whose places it has to learn
        start, width_in = (-(-height // 8), -(-width // 8)), 64
        layers += [nn.Conv2d(shape[0], 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(2)]
        layers += [nn.Linear(shape[1], math.prod(start)), nn.Unflatten(2, start)]
    if len(shape) == 1:
        layers += [nn.Linear(shape[0], 64 * math.prod(start)), nn.Unflatten(1, (64, *start))]
    layers += [nn.Conv2d(width_in, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    size, inner = start[0], 64
    while size < height:
        outer = max(16, inner // 2)
        # Each position makes four: cheaper than a convolution at the larger size.
        layers += [nn.Conv2d(inner, 4 * outer, 3, padding=1), nn.PixelShuffle(2)]
        layers += [nn.BatchNorm2d(outer), nn.ReLU()]
        size, inner = 2 * size, outer
    layers += [nn.Upsample((height, width), mode="bilinear")]
    layers += [nn.Conv2d(inner, channels, 3, padding=1), nn.Sigmoid()]
    return nn.Sequential(*layers)


def _vectors(z: Tensor) -> Callable[[Tensor], Tensor]:
    fitted = whiten(z.flatten(1)) if z[0].numel() <= WIDE else standardize(z.flatten(1))
    return lambda x: fitted(x.flatten(1))


def _per_channel(z: Tensor) -> Callable[[Tensor], Tensor]:
    # Constant channels go: the rounding left in them, divided by almost nothing, drowns the rest.
    dim = channel_dims(z)[0]
    fitted = per_pixel(standardize(z.movedim(dim, -1).flatten(0, -2)))
    return lambda x: fitted(as_map(x, dim))
