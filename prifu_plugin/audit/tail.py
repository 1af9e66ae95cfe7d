"""The task's own tail as an attacker: the layers behind the cut, trained on for a private label."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.graph.undisturbed import undisturbed


def repurposed(cloud: nn.Module, z: Tensor, classes: int) -> nn.Module | None:
    """Return a copy of the cloud that says one of K classes, all else as it was trained.

    Args:
        cloud: what arrives -> the task's logits (N, T); it is not changed.
        z: what arrives, a few samples.
        classes: K.

    Returns:
        A module on the CPU; None if the cloud has but one layer, or does not end in a linear one:
        a linear attacker is no stronger for having the task's weights.

    Example:
        >>> cloud = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> repurposed(cloud, torch.zeros(2, 4), 5)(torch.zeros(3, 4)).shape
        torch.Size([3, 5])
    """
    net = copy.deepcopy(cloud).cpu().float()
    called: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_hook(lambda m, _, y, path=path: called.append((path, y)))
        for path, module in net.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    with undisturbed(net), torch.no_grad():
        logits = net.eval()(z[:2].clone())
    for hook in hooks:
        hook.remove()
    if len(called) < 2:
        return None
    path, said = called[-1]
    last = net.get_submodule(path)
    if not isinstance(last, nn.Linear) or said is not logits:
        return None
    head = nn.Linear(last.in_features, classes)
    owner, _, name = path.rpartition(".")
    setattr(net.get_submodule(owner), name, head)
    return _Copying(net.requires_grad_(True))


class _Copying(nn.Module):
    """Call a network on a copy, since it may begin with an operation in place."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.net(z.clone())
        return logits
