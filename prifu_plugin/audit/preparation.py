"""What an attacker does to uploads first: the part of the attack that undoes a mere rescaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prifu_plugin.device import seeded

Transform = Callable[[Tensor], Tensor]

TOLERANCE = 1e-7
"""Directions this much weaker than the strongest are rounding errors of fp32, not information."""
MOST = 256
"""Components a first look keeps; "whitened fully" keeps all, also the weakest."""
WIDE = 2048
"""Values above which maps and tokens are reduced to their strongest components."""


@dataclass(frozen=True)
class Preparation:
    """A fitted transform of uploads to vectors or maps.

    Attributes:
        name: for the report.
        transform: uploads (N, ...) -> attacker's input.
        spatial: whether that keeps the shape of uploads, rather than being (N, D).
    """

    name: str
    transform: Transform
    spatial: bool = False


def vectors(z: Tensor, names: tuple[str, ...]) -> list[Preparation]:
    """Fit the preparations of vectors on training uploads.

    Args:
        z: (N, ...); tokens and maps are flattened, and summarized by their moments besides, of
            both dimensions that may be channels.
        names: of "raw", "standardized", "whitened", "ranked".

    Returns:
        For vectors one preparation a name; for maps two or three, of all values and of moments.
    """
    makers: dict[str, Callable[[Tensor], Transform]] = {
        "raw": _raw,
        "standardized": standardize,
        "whitened": lambda x: whiten(x, MOST),
        "whitened fully": whiten,
        "ranked": rank,
    }
    views: list[tuple[str, Transform]] = [("", _flat)]
    if z.ndim > 2:
        first, *other = channel_dims(z)
        views = [("", _reduced(z)), ("moments, ", _moments(first))]
        views += [("moments of the other dimension, ", _moments(dim)) for dim in other]
    if z.ndim == 3:  # a class token, or simply one of many
        views.append(("first token, ", lambda x: x[:, 0]))
    found = []
    for label, view in views:
        seen = view(z)
        for name in names:
            if name == "whitened fully" and seen.shape[1] <= MOST:
                continue  # "whitened" has all components already
            found.append(Preparation(label + name, _then(view, makers[name](seen))))
    return found


def channel_dims(z: Tensor) -> tuple[int, ...]:
    """Return which dimensions of maps or tokens may be channels, the likelier one first.

    Nothing else tells (N, C, H, W) from (N, H, W, C) but that maps mostly are square.

    Example:
        >>> channel_dims(torch.zeros(2, 48, 14, 14)), channel_dims(torch.zeros(2, 14, 14, 48))
        ((1,), (-1, 1))
    """
    if z.ndim < 4:
        return (-1, 1)[: z.ndim - 1]
    first, last = z.shape[-2] == z.shape[-1], z.shape[-3] == z.shape[-2]
    if first != last:
        return (1,) if first else (-1, 1)
    return 1, -1


def is_spatial(z: Tensor) -> bool:
    """Whether uploads are maps of more than one row and column."""
    return z.ndim == 4 and min(as_map(z, channel_dims(z)[0]).shape[2:]) > 1


def maps(z: Tensor) -> list[Preparation]:
    """Fit the preparations of maps: channels standardized, channels whitened; (N, C, H, W) then.

    Tokens (N, T, C) become a column of T places.
    """
    shape = partial(as_map, dim=channel_dims(z)[0])
    shaped = shape(z)
    pixels = shaped.movedim(1, -1).flatten(0, -2)
    if len(pixels) > 200_000:
        pixels = pixels[torch.randperm(len(pixels), generator=_generator())[:200_000]]
    found = []
    for name, maker in (("channels standardized", standardize), ("channels whitened", whiten)):
        fitted = maker(pixels)
        found.append(Preparation(name, _then(shape, per_pixel(fitted)), spatial=True))
    return found


def as_map(z: Tensor, dim: int) -> Tensor:
    """Return maps and tokens as (N, C, H, W), with the channels from a dimension."""
    moved = z.movedim(dim, 1)
    return moved.unsqueeze(-1) if z.ndim == 3 else moved


def as_they_are() -> Preparation:
    """Return the preparation that changes nothing, for attackers that take what the task takes."""
    return Preparation("unprepared", _same, spatial=True)


def standardize(z: Tensor) -> Transform:
    """Fit mean 0 and deviation 1; constant dimensions are dropped.

    Example:
        >>> z = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> standardize(z)(z).shape
        torch.Size([2, 1])
    """
    mean, deviation = z.double().mean(0), z.double().std(0, correction=0)
    kept = _varies(z)

    def apply(x: Tensor) -> Tensor:
        return ((x.double() - mean)[:, kept] / deviation[kept]).float()

    return apply


def whiten(z: Tensor, most: int | None = None, tolerance: float = TOLERANCE) -> Transform:
    """Fit principal components, each with deviation 1: small directions count like large ones.

    Args:
        z: (N, D).
        most: components to keep, the strongest; None for all.
        tolerance: of the strongest, below which components are left out.

    Example:
        >>> z = torch.randn(100, 2) * torch.tensor([1.0, 1e-4])
        >>> whiten(z)(z).std(0).round().tolist()
        [1.0, 1.0]
    """
    kept = _varies(z)
    if not kept.any():
        return lambda x: x.new_empty(len(x), 0)
    mean = z.double().mean(0)
    centred = (z.double() - mean)[:, kept]
    # Scaled to equal deviations first, so that the tolerance is about directions, not units.
    scale = 1 / centred.std(0)
    values, directions = _principal(centred * scale)
    strong = (values > tolerance**2 * values.max().clamp_min(1e-300)).nonzero().flatten()
    strong = strong if most is None else strong[-most:]
    turn = directions[:, strong] / values[strong].sqrt()

    def apply(x: Tensor) -> Tensor:
        turned: Tensor = ((x.double() - mean)[:, kept] * scale) @ turn
        return turned.float()

    return apply


def _principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variances, ascending, and directions of centred values (N, D); the cheaper way."""
    count = max(len(x) - 1, 1)
    if x.shape[1] <= len(x):
        found: tuple[Tensor, Tensor] = torch.linalg.eigh(x.T @ x / count)
        return found
    values, places = torch.linalg.eigh(x @ x.T / count)
    along = values > 1e-14 * values.max()
    values, places = values[along], places[:, along]
    return values, x.T @ places / (values * count).sqrt()


def rank(z: Tensor) -> Transform:
    """Fit ranks among training values, mapped to a Gaussian: monotone distortions are undone.

    Example:
        >>> z = torch.arange(5.0)[:, None]
        >>> rank(z)(z.exp()).shape
        torch.Size([5, 1])
    """
    order = z.double().sort(0).values.T.contiguous()
    kept = order[:, 0] < order[:, -1]
    order = order[kept]

    def apply(x: Tensor) -> Tensor:
        place = torch.searchsorted(order, x.double().T[kept].contiguous()).T
        share = (place.double() + 0.5) / (len(z) + 1)
        gaussian: Tensor = torch.erfinv(2 * share - 1) * 2**0.5
        return gaussian.float()

    return apply


def _varies(z: Tensor) -> Tensor:
    """Return which dimensions are not constant, whatever their scale."""
    spread = z.double().std(0, correction=0)
    return (z.amax(0) > z.amin(0)) & (spread > 1e-9 * z.double().mean(0).abs())


def _raw(z: Tensor) -> Transform:
    return _same


def _same(x: Tensor) -> Tensor:
    return x.float()


def _flat(z: Tensor) -> Tensor:
    return z.flatten(1)


def _moments(dim: int) -> Transform:
    """Return what gives mean, deviation and extremes of each channel."""

    def apply(z: Tensor) -> Tensor:
        lines = z.movedim(dim, 1).flatten(2)
        parts = (lines.mean(2), lines.std(2, correction=0), lines.amax(2), lines.amin(2))
        return torch.cat(parts, 1)

    return apply


def _reduced(z: Tensor) -> Transform:
    """Flatten; to principal components, of standardized values, if there are very many."""
    flat = z.flatten(1)
    if flat.shape[1] <= WIDE:
        return _flat
    scale = standardize(flat)
    seen = scale(flat)
    with seeded(0):
        _, _, turn = torch.pca_lowrank(seen, min(MOST, *seen.shape), niter=3)
    return lambda x: scale(x.flatten(1)) @ turn


def _then(first: Transform, second: Transform) -> Transform:
    return lambda x: second(first(x))


def per_pixel(fitted: Transform) -> Transform:
    """Return a transform of maps (N, C, H, W) that applies one of vectors at each place."""

    def apply(x: Tensor) -> Tensor:
        moved = x.movedim(1, -1)
        back: Tensor = fitted(moved.flatten(0, -2)).unflatten(0, moved.shape[:-1])
        return back.movedim(-1, 1)

    return apply


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
