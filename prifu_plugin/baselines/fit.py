"""One schedule of training for every method, so that none has more effort than another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prifu_plugin.baselines.base import Batch, Defence
from prifu_plugin.device import device_of
from prifu_plugin.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: SGD with two drops of the rate.

    Attributes:
        epochs: over the training data.
        batch: images a step.
        rate: of SGD, without momentum as in the paper.
        drops: shares of training after which the rate is a tenth.
        finishing: steps for what a method does after training.
    """

    epochs: int = 12
    batch: int = 64
    rate: float = 0.1
    drops: tuple[float, float] = (0.6, 0.85)
    finishing: int = 150

    def rates(self, count: int) -> list[float]:
        """Return the learning rate of every step on `count` images.

        Example:
            >>> Schedule(epochs=2, drops=(0.5, 0.75)).rates(128)
            [0.1, 0.1, 0.01, 0.001]
        """
        total = self.epochs * (count // self.batch)
        places = [int(share * total) for share in self.drops]
        return [
            round(self.rate * 0.1 ** sum(step >= place for place in places), 12)
            for step in range(total)
        ]


def fit(
    defence: Defence,
    images: Tensor,
    task: Tensor,
    private: Tensor | None = None,
    *,
    schedule: Schedule | None = None,
    seed: int = 0,
    desc: str = "",
) -> Defence:
    """Train a method; returns it in eval mode.

    Args:
        defence: to train, in place, on the device of its edge.
        images: (N, C, H, W).
        task: (N,), the label the model serves.
        private: (N,), the label that is named; methods that need none ignore it.
        schedule: the same for all that is compared.
        seed: of the order of the images.
        desc: for the progress bar.

    Raises:
        ConfigError: if there are fewer images than one batch, labels do not fit, or a method
            misses its label.
    """
    _check_labels(len(images), task=task, private=private)
    schedule = schedule or Schedule()
    rates = schedule.rates(len(images))
    if not rates:
        raise ConfigError(f"{len(images)} images are fewer than a batch of {schedule.batch}.")
    generator = torch.Generator().manual_seed(seed)
    device = device_of(defence.edge)
    defence.to(device)

    def draw() -> list[Batch]:
        order = torch.randperm(len(images), generator=generator)
        parts = order[: len(order) // schedule.batch * schedule.batch].split(schedule.batch)
        named = [None if private is None else private[part] for part in parts]
        return [
            Batch(images[p].to(device), task[p].to(device), None if s is None else s.to(device))
            for p, s in zip(parts, named, strict=True)
        ]

    optimizer = torch.optim.SGD(defence.defenders(), lr=schedule.rate)
    classes = 0 if private is None else int(private.max()) + 1
    batches = draw()
    defence.begin(batches[0], classes, optimizer)
    defence.train()
    for step, rate in enumerate(tqdm(rates, desc=desc or type(defence).__name__, disable=None)):
        place = step % len(batches)
        if place == 0 and step:
            batches = draw()
        for group in optimizer.param_groups:
            group["lr"] = rate
        defence.progress = step / len(rates)
        defence.step(batches[place])
    defence.eval()
    if schedule.finishing == 0:
        return defence
    last = [batch for _ in range(-(-schedule.finishing // len(batches))) for batch in draw()]
    defence.finish(last[: schedule.finishing])
    return defence.eval()


def _check_labels(count: int, **labels: Any) -> None:
    for name, label in labels.items():
        if name == "private" and label is None:
            continue
        fits = isinstance(label, Tensor) and label.shape == (count,)
        if not fits or label.is_floating_point() or label.is_complex():
            raise ConfigError(
                f"{name} does not hold one class an image: pass a tensor of integers, ({count},)."
            )
