"""Generated faces with a dozen attributes, for audits without private pictures.

Vector drawings, antialiased, under varying pose, light and colour. They are no portraits: what is
measured on them says how methods compare, not what real photographs give away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prifu_plugin.errors import ConfigError

ATTRIBUTES = {
    "smiling": 2,
    "glasses": 2,
    "long_hair": 2,
    "hat": 2,
    "wrinkles": 2,
    "lipstick": 2,
    "cheekbones": 2,
    "beard": 2,
    "earrings": 2,
    "bushy_brows": 2,
    "hair_colour": 4,
    "skin_tone": 4,
}
"""Attribute -> number of classes; the task is smiling."""

_PIXELS = 32 * 64 * 64
"""Drawn together: more of them leave the processor's cache, and take longer."""
_HAIR = torch.tensor(
    [[0.12, 0.09, 0.08], [0.42, 0.26, 0.14], [0.85, 0.68, 0.36], [0.62, 0.62, 0.64]]
)
_SKIN = torch.tensor([[0.98, 0.83, 0.72], [0.87, 0.66, 0.5], [0.66, 0.45, 0.31], [0.4, 0.26, 0.18]])


@dataclass(frozen=True)
class Faces:
    """Generated faces and what was drawn.

    Attributes:
        images: (N, 3, size, size), RGB in [0, 1].
        labels: attribute -> classes (N,), integers from 0.
    """

    images: Tensor
    labels: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def part(self, start: int, stop: int) -> Faces:
        """Return the images from start to stop."""
        labels = {name: label[start:stop] for name, label in self.labels.items()}
        return Faces(self.images[start:stop], labels)


def generate_faces(
    count: int,
    size: int = 64,
    *,
    correlations: Mapping[tuple[str, str], float] | None = None,
    seed: int = 0,
) -> Faces:
    """Draw faces.

    Args:
        count: how many.
        size: pixels a side, 48 to 128.
        correlations: (attribute, other) -> correlation of their class numbers, in [-1, 1], or
            +-0.894 of one with two classes and one with four; each attribute may follow one other.
            All else is independent, and all are balanced.
        seed: of everything.

    Returns:
        The same faces for the same arguments.

    Raises:
        ConfigError: for a size, attribute or correlation that cannot be.

    Example:
        >>> faces = generate_faces(4, 48)
        >>> faces.images.shape, len(faces.labels)
        (torch.Size([4, 3, 48, 48]), 12)
    """
    if not 48 <= size <= 128 or count < 1:
        raise ConfigError(
            f"count={count}, size={size}: draw one face or more, of 48 to 128 pixels."
        )
    generator = torch.Generator().manual_seed(seed)
    labels = _labels(count, dict(correlations or {}), generator)
    chance = torch.rand(count, 24, generator=generator)
    images = torch.empty(count, 3, size, size)
    some = max(1, _PIXELS // size**2)
    for start in range(0, count, some):
        part = slice(start, start + some)
        canvas = _Canvas(chance[part], size)
        images[part] = _draw(canvas, {k: v[part] for k, v in labels.items()}, chance[part])
    noise = torch.randn(images.shape, generator=generator)
    return Faces((images + 0.02 * noise).clamp(0, 1), labels)


def _labels(
    count: int, correlations: dict[tuple[str, str], float], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw balanced labels; one that follows another does so for a share of faces only."""
    found = {
        name: torch.randint(classes, (count,), generator=generator)
        for name, classes in ATTRIBUTES.items()
    }
    for name, other in _in_order(correlations):
        wanted, classes = correlations[name, other], (ATTRIBUTES[name], ATTRIBUTES[other])
        follows = torch.rand(count, generator=generator) < abs(wanted) / _most(*classes)
        within = torch.rand(count, generator=generator)
        ahead = ((found[other] + within) / classes[1] * classes[0]).long()
        ahead = ahead if wanted >= 0 else classes[0] - 1 - ahead
        found[name] = torch.where(follows, ahead, found[name])
    return found


def _most(classes: int, others: int) -> float:
    """Return the correlation of two balanced attributes of which one follows the other always."""
    fine = torch.arange(math.lcm(classes, others))
    pair = torch.stack([fine * classes // len(fine), fine * others // len(fine)]).double()
    return float(torch.corrcoef(pair)[0, 1])


def _in_order(correlations: dict[tuple[str, str], float]) -> list[tuple[str, str]]:
    """Check correlations, and order them so that what is followed is drawn before its followers."""
    followed = dict(correlations.keys())
    for (name, other), correlation in correlations.items():
        for one in (name, other):
            if one not in ATTRIBUTES:
                raise ConfigError(f"No attribute '{one}'; there are {', '.join(ATTRIBUTES)}.")
        most = _most(ATTRIBUTES[name], ATTRIBUTES[other])
        if not abs(correlation) <= most + 1e-9 or followed[name] != other or name == other:
            raise ConfigError(
                f"The correlation {correlation} of '{name}' with '{other}': it must be in "
                f"[{-most:.3g}, {most:.3g}], and an attribute can follow one other only."
            )

    def depth(name: str) -> int:
        steps = 0
        while name in followed:
            name, steps = followed[name], steps + 1
            if steps > len(followed):
                raise ConfigError(f"The correlations go round in a circle at '{name}'.")
        return steps

    return sorted(correlations, key=lambda pair: depth(pair[0]))


class _Canvas:
    """Images being painted, in the coordinates of each face: x to the right, y down, +-1 a side."""

    def __init__(self, chance: Tensor, size: int) -> None:
        line = (torch.arange(size) + 0.5) / size * 2 - 1
        y, x = torch.meshgrid(line, line, indexing="ij")
        angle = 0.35 * (chance[:, 0] - 0.5)
        scale = 0.85 + 0.25 * chance[:, 1]
        x = x[None] - 0.25 * (chance[:, 2, None, None] - 0.5)
        y = y[None] - 0.2 * (chance[:, 3, None, None] - 0.5)
        cos, sin = (v[:, None, None] / scale[:, None, None] for v in (angle.cos(), angle.sin()))
        self.x, self.y = cos * x + sin * y, cos * y - sin * x
        self.edge = 2.5 / size
        self.image = torch.zeros(len(chance), 3, size, size)

    def ellipse(self, x: object, y: object, width: object, height: object) -> Tensor:
        """Return how much of each pixel is inside an ellipse, (N, size, size)."""
        a, b = _wide(width), _wide(height)
        u, v = (self.x - _wide(x)) / a, (self.y - _wide(y)) / b
        radius = (u.square() + v.square()).sqrt()
        return self._inside((radius - 1) * torch.minimum(a, b))

    def box(self, x: object, y: object, width: object, height: object) -> Tensor:
        """Return how much of each pixel is inside a box."""
        across = (self.x - _wide(x)).abs() - _wide(width)
        return self._inside(torch.maximum(across, (self.y - _wide(y)).abs() - _wide(height)))

    def ring(self, x: object, y: object, radius: object, thick: float) -> Tensor:
        """Return how much of each pixel is on a circle."""
        distance = ((self.x - _wide(x)).square() + (self.y - _wide(y)).square()).sqrt()
        return self._inside((distance - _wide(radius)).abs() - thick)

    def arc(self, x: object, y: object, width: object, bend: object, thick: object) -> Tensor:
        """Return how much of each pixel is on a parabola; bend > 0 turns its ends up."""
        u = (self.x - _wide(x)) / _wide(width)
        curve = _wide(y) - _wide(bend) * u.square()
        return self._inside(
            torch.maximum((self.y - curve).abs() - _wide(thick), (u.abs() - 1) * _wide(width))
        )

    def paint(self, mask: Tensor, colour: Tensor, opacity: object = 1.0) -> None:
        """Put a colour, (3,) or (N, 3) or whole images, on what a mask covers."""
        if colour.ndim < 4:
            colour = colour.reshape(-1, 3, 1, 1)
        cover = (mask * _wide(opacity))[:, None]
        self.image = self.image * (1 - cover) + colour * cover

    def _inside(self, distance: Tensor) -> Tensor:
        return (0.5 - distance / self.edge).clamp(0, 1)


def _wide(value: object) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float32)
    return tensor.reshape(-1, 1, 1)


def _draw(canvas: _Canvas, labels: dict[str, Tensor], chance: Tensor) -> Tensor:
    flags = {name: label.float() for name, label in labels.items()}
    tint = 0.12 * (chance[:, 4:7] - 0.5)
    skin = (_SKIN[labels["skin_tone"]] + tint).clamp(0, 1)
    hair = (_HAIR[labels["hair_colour"]] + tint).clamp(0, 1)
    _background(canvas, chance)
    _hair_behind(canvas, flags, hair)
    _head(canvas, flags, skin, chance)
    _hair_before(canvas, flags, hair, chance)
    _eyes(canvas, flags, hair, chance)
    _mouth(canvas, flags, skin, chance)
    _things(canvas, flags, chance)
    light = (
        1
        + 0.3 * (chance[:, 7] - 0.5)[:, None, None]
        + 0.35 * ((chance[:, 8] - 0.5)[:, None, None] * canvas.x)
    )
    return (canvas.image * light[:, None]).clamp(0, 1)


def _background(canvas: _Canvas, chance: Tensor) -> None:
    low, high = chance[:, 9:12] * 0.7 + 0.2, chance[:, 12:15] * 0.7 + 0.2
    share = ((canvas.y + 1.3) / 2.6).clamp(0, 1)[:, None]
    canvas.image = low[:, :, None, None] * share + high[:, :, None, None] * (1 - share)
    canvas.paint(canvas.ellipse(0.0, 1.35, 0.95, 0.55), high.flip(1) * 0.8)


def _hair_behind(canvas: _Canvas, flags: dict[str, Tensor], hair: Tensor) -> None:
    canvas.paint(canvas.ellipse(0.0, 0.12, 0.68, 0.95), hair * 0.85, flags["long_hair"])


def _head(canvas: _Canvas, flags: dict[str, Tensor], skin: Tensor, chance: Tensor) -> None:
    canvas.paint(canvas.box(0.0, 0.75, 0.2, 0.3), skin * 0.85)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.53, 0.02, 0.09, 0.14), skin * 0.9)
    width = 0.5 + 0.06 * (chance[:, 15] - 0.5)
    canvas.paint(canvas.ellipse(0.0, 0.0, width, 0.7), skin)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.27, 0.2, 0.13, 0.07), skin * 1.15, flags["cheekbones"])
        canvas.paint(
            canvas.arc(side * 0.3, 0.33, 0.12, 0.05, 0.022), skin * 0.72, flags["cheekbones"]
        )
    for y in (-0.42, -0.34):
        canvas.paint(canvas.arc(0.0, y, 0.24, -0.02, 0.012), skin * 0.68, flags["wrinkles"])
    for side in (-1, 1):
        canvas.paint(
            canvas.arc(side * 0.36, -0.05, 0.07, -0.03, 0.012), skin * 0.68, flags["wrinkles"]
        )
    canvas.paint(canvas.ellipse(0.03, 0.13, 0.055, 0.13), skin * 0.88)


def _hair_before(canvas: _Canvas, flags: dict[str, Tensor], hair: Tensor, chance: Tensor) -> None:
    cap = canvas.ellipse(0.0, -0.12, 0.57, 0.68)
    line = -0.42 + 0.12 * (chance[:, 16] - 0.5)
    above = ((_wide(line) - canvas.y + 0.3 * canvas.x.square()) / canvas.edge).clamp(0, 1)
    canvas.paint(cap * above, hair)
    chin = canvas.ellipse(0.0, 0.05, 0.5, 0.66) * ((canvas.y - 0.3) / canvas.edge).clamp(0, 1)
    canvas.paint(chin, hair * 0.9, 0.8 * flags["beard"])


def _eyes(canvas: _Canvas, flags: dict[str, Tensor], hair: Tensor, chance: Tensor) -> None:
    gaze = 0.04 * (chance[:, 17] - 0.5)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.2, -0.1, 0.095, 0.058), torch.tensor([0.97] * 3))
        canvas.paint(canvas.ellipse(side * 0.2 + gaze, -0.1, 0.045, 0.05), hair * 0.3 + 0.05)
        thick = 0.016 + 0.034 * flags["bushy_brows"]
        canvas.paint(canvas.arc(side * 0.2, -0.25, 0.13, -0.03, thick), hair * 0.7)


def _mouth(canvas: _Canvas, flags: dict[str, Tensor], skin: Tensor, chance: Tensor) -> None:
    smiling = flags["smiling"]
    bend = torch.where(smiling > 0, 0.05 + 0.09 * chance[:, 18], -0.07 + 0.08 * chance[:, 18])
    width = 0.2 + 0.05 * smiling * chance[:, 19] + 0.03 * chance[:, 20]
    red = torch.tensor([0.78, 0.1, 0.2])
    painted = flags["lipstick"][:, None]
    lips = red * painted + (skin * torch.tensor([0.75, 0.5, 0.48])) * (1 - painted)
    thick = 0.034 + 0.016 * flags["lipstick"]
    canvas.paint(canvas.arc(0.0, 0.42 + 0.5 * bend, width, bend, thick), lips)
    open_wide = smiling * (chance[:, 21] > 0.5).float()
    canvas.paint(
        canvas.arc(0.0, 0.42 + 0.5 * bend, 0.75 * width, bend, 0.016), torch.ones(3), open_wide
    )


def _things(canvas: _Canvas, flags: dict[str, Tensor], chance: Tensor) -> None:
    dark = torch.tensor([0.1, 0.1, 0.12])
    for side in (-1, 1):
        canvas.paint(canvas.ring(side * 0.2, -0.09, 0.15, 0.02), dark, flags["glasses"])
        gold = torch.tensor([0.95, 0.8, 0.25])
        canvas.paint(canvas.ellipse(side * 0.55, 0.22, 0.045, 0.065), gold, flags["earrings"])
    canvas.paint(canvas.box(0.0, -0.09, 0.06, 0.016), dark, flags["glasses"])
    cloth = chance[:, 21:24] * 0.7 + 0.1
    crown = canvas.ellipse(0.0, -0.62, 0.52, 0.34) * ((-0.5 - canvas.y) / canvas.edge).clamp(0, 1)
    canvas.paint(crown, cloth, flags["hat"])
    canvas.paint(canvas.box(0.0, -0.5, 0.68, 0.05), cloth * 0.75, flags["hat"])
