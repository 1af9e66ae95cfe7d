"""Dropout that a traced graph has lost: its flag was off in eval mode, and stays off."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx


def asleep(graph: fx.Graph) -> list[tuple[str, str]]:
    """Note functional dropout, whose flag was off in the eval mode of the trace, and stays off."""
    why = (
        "functional dropout, which drops nothing in the pruned model, in training neither: its "
        "graph is that of eval mode; nn.Dropout modules do drop"
    )
    calls = [node for node in graph.nodes if node.target in _DROPOUTS]
    return [(node.name, why) for node in calls if _rate(node) != 0]


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout)


def _rate(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
