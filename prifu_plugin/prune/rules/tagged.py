"""Operations that torch itself marks as pointwise, alone or made of nothing else."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.rules.base import Analysis, Rule, run
from prifu_plugin.prune.rules.loose import loose_numbers
from prifu_plugin.prune.rules.pointwise import PointwiseRule, as_seen
from prifu_plugin.prune.seen import seen

_JUMPS = {
    *("eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isinf", "isnan", "sign", "sgn"),
    *("floor", "ceil", "round", "trunc", "frac", "fmod", "remainder", "heaviside", "nextafter"),
    *("angle", "floor_divide", "copysign", "atan2", "signbit"),
}
"""What rounding, or the sign of a 0, can change: a constant may stand where they jump."""

_PLAIN = {"detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy"}
"""What is marked as nothing, and gives each element as it is."""


def tagged_rule(analysis: Analysis, node: fx.Node) -> Rule | None:
    """Return the rule of pointwise operations if all that a node runs are marked so, or None."""
    example = seen(node).example
    facts = {n: analysis.values.get(n) for n in node.all_input_nodes}
    tensors = {n: fact for n, fact in facts.items() if isinstance(fact, Fact)}
    if node.op == "call_module":  # a leaf, which somebody may have asked to keep its inputs whole
        return None
    if node.target is operator.getitem or loose_numbers(analysis, node):  # all there, at this size
        return None
    if not tensors or not isinstance(example, torch.Tensor) or not example.is_floating_point():
        return None
    if max(len(fact.shape) for fact in tensors.values()) != len(seen(node).shape):
        return None
    given = {n: as_seen(n, f.known.expand(f.shape)) for n, f in tensors.items()}
    marked = _Marked()
    try:
        with marked:
            run(analysis, node, lambda n: given[n] if n in given else facts[n])
    except Exception:  # noqa: BLE001 - then nothing is known of it
        return None
    return PointwiseRule(node) if marked.holds else None


class _Marked(TorchDispatchMode):
    """Note whether all operations that run are marked as pointwise."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.holds = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at an operation and run it."""
        name = func.overloadpacket.__name__
        marked = torch.Tag.pointwise in func.tags and name not in _JUMPS
        self.holds &= marked or name in _PLAIN
        return func(*args, **(kwargs or {}))
