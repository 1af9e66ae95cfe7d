"""What every method is: a network cut in two, a step of training, and what it uploads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prifu_plugin.arguments import number
from prifu_plugin.errors import ConfigError, OrderError, first_line
from prifu_plugin.graph.undisturbed import undisturbed

RAMP = 0.2
"""Share of training over which a method's pressure grows from 0; from the first step on it keeps
a network from learning the task at all."""


@dataclass(frozen=True)
class Batch:
    """What a step of training sees.

    Attributes:
        images: (N, C, H, W).
        task: the label the model serves, (N,).
        private: the label that is named as private, (N,); None for methods that need none.
    """

    images: Tensor
    task: Tensor
    private: Tensor | None = None


class Defence(nn.Module):
    """Edge and cloud, and how a method trains them.

    A method overrides `opponents` (the networks it plays against), `play` (their turn) and
    `loss` (what edge and cloud minimize). Opponents see detached uploads; what flows back into
    them from the edge's turn is discarded.

    Args:
        edge: images -> upload, from `prifu_plugin.split`.
        cloud: upload -> logits.
        strength: of the method's pressure, in its own unit.

    Attributes:
        edge: may be the given one with a method's own layers behind it.
        cloud: likewise.
        progress: share of training that is done, in [0, 1].
    """

    needs_private: ClassVar[bool] = False
    takes_tokens: ClassVar[bool] = False

    def __init__(self, edge: nn.Module, cloud: nn.Module, *, strength: float = 0.0) -> None:
        super().__init__()
        strength = number("strength", strength)
        if not strength >= 0:
            raise ConfigError(f"strength={strength} of {type(self).__name__}: at least 0.")
        self.edge = edge
        self.cloud = cloud
        self.strength = strength
        self.progress = 0.0
        self.optimizer: torch.optim.Optimizer | None = None

    def begin(self, batch: Batch, classes: int, optimizer: torch.optim.Optimizer) -> None:
        """Build the opponents for the shapes of a batch; call once before the first `step`.

        Args:
            batch: images as in training.
            classes: number of private classes; 0 without.
            optimizer: of `defenders()`.

        Raises:
            ConfigError: for a missing private label, or uploads that the method cannot take.
        """
        if self.needs_private and (batch.private is None or classes < 2):
            raise ConfigError(
                f"{type(self).__name__} needs a private label of two classes or more in training: "
                "pass private=."
            )
        self.optimizer = optimizer
        self.opponents(self._first_upload(batch.images), batch.images, classes)

    def _first_upload(self, images: Tensor) -> Tensor:
        """Return an upload; refuse what this method cannot defend, before anything is trained."""
        cure = (
            "Pass an edge that uploads (N, C) or (N, C, H, W), and a method made for its channels; "
            "of one that uploads tokens (N, T, C), *prifu_plugin.baselines.tokens_as_maps(edge, "
            "cloud)."
        )
        try:
            with undisturbed(self.edge), torch.no_grad():
                z: Tensor = self.edge.eval()(images)
        except Exception as error:
            said = first_line(error)
            raise ConfigError(f"{type(self).__name__} cannot upload: {said}. {cure}") from error
        if z.ndim not in (2, 4) and not (z.ndim == 3 and self.takes_tokens):
            raise ConfigError(f"{type(self).__name__} would upload {tuple(z.shape)}. {cure}")
        return z

    def defenders(self) -> list[nn.Parameter]:
        """Return what the main optimizer trains: edge and cloud, not the opponents."""
        return [*self.edge.parameters(), *self.cloud.parameters()]

    def step(self, batch: Batch) -> dict[str, float]:
        """Train everything on one batch; returns the terms of the loss.

        Raises:
            OrderError: before `begin`.
        """
        if self.optimizer is None:
            raise OrderError(f"{type(self).__name__}.step before begin: train with baselines.fit.")
        z = self.edge(batch.images)
        self.play(z.detach(), batch)
        loss, terms = self.loss(z, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach()), **terms}

    def encode(self, images: Tensor) -> Tensor:
        """Return what is uploaded, as deployed: in eval mode, without gradients."""
        with undisturbed(self.edge), torch.no_grad():
            z: Tensor = self.edge.eval()(images)
        return z

    def opponents(self, z: Tensor, images: Tensor, classes: int) -> None:
        """Build the networks of the other side; none by default."""

    def play(self, z: Tensor, batch: Batch) -> None:
        """Take the opponents' turn on detached uploads; nothing by default."""

    def loss(self, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return what edge and cloud minimize, and its terms by name."""
        task = F.cross_entropy(self.cloud(z), batch.task)
        return task, {"task": float(task.detach())}

    def finish(self, batches: list[Batch]) -> None:
        """Do what a method does after training; nothing by default."""

    def pressure(self) -> float:
        """Return the strength at this point of training."""
        return self.strength * min(1.0, self.progress / RAMP)


class TaskOnly(Defence):
    """Training for the task and nothing else: the undefended model, or one with filters in it."""

    takes_tokens = True
