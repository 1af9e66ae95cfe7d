"""The networks that rivals train against: classifiers of a private label, and decoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = 2e-3
"""Learning rate of an opponent's Adam."""

TURNS = 2
"""Steps an opponent takes for one of the edge's: a stale adversary protects from nobody."""


def classifier(z: Tensor, classes: int, hidden: int = 128) -> nn.Module:
    """Build a network from uploads to private classes.

    Its inputs are normalized, so that scale alone does not beat it.

    Args:
        z: a batch of uploads, (N, C) or (N, C, H, W).
        classes: number of private classes.
        hidden: its width.
    """
    layers: list[nn.Module] = []
    if z.ndim == 4 and min(z.shape[2:]) > 1:
        layers += [nn.BatchNorm2d(z.shape[1]), nn.Conv2d(z.shape[1], 32, 3, 2, 1), nn.ReLU()]
    layers += [nn.Flatten()]
    with torch.no_grad():
        width = nn.Sequential(*layers).to(z.device)(z).shape[1]
    layers += [nn.BatchNorm1d(width), nn.Linear(width, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes)).to(z.device)


class Opponent(nn.Module):
    """A network and its optimizer.

    Args:
        net: uploads -> logits or images.
        turns: optimizer steps for each call of `learn`.
    """

    def __init__(self, net: nn.Module, turns: int = TURNS) -> None:
        super().__init__()
        self.net = net
        self.turns = turns
        self.optimizer = torch.optim.Adam(net.parameters(), lr=RATE)

    def forward(self, z: Tensor) -> Tensor:
        """Return what the network says of uploads."""
        said: Tensor = self.net(z)
        return said

    def learn_label(self, z: Tensor, label: Tensor) -> None:
        """Take steps on the cross-entropy of a private label."""
        for _ in range(self.turns):
            self._take(F.cross_entropy(self.net(z), label))

    def learn_images(self, z: Tensor, images: Tensor) -> None:
        """Take steps on the squared error of a reconstruction."""
        for _ in range(self.turns):
            self._take(F.mse_loss(self.net(z), images))

    def _take(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * grad, None  # type: ignore[attr-defined]


def reverse_gradient(x: Tensor, scale: float) -> Tensor:
    """Return x; its gradient is multiplied by -scale."""
    reversed_x: Tensor = _Reverse.apply(x, scale)
    return reversed_x
