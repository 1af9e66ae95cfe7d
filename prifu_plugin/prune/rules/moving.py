"""Where removing channels would cost a copy: they stay if the work they cause is cheaper.

A closed channel goes for nothing where the layers before and after it shrink together. Elsewhere
(after a normalization that needs all of its inputs, at a sum with a wider operand) values have to
be moved. What moving one value costs, in multiply-accumulates, depends on the runtime, so that it
is given (`prune(move_cost=)`) or measured (`fastest`).
"""

from __future__ import annotations

from torch import Tensor, fx

from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.rules.base import Analysis

COPIES = 2
"""Filling channels in pads a tensor and selects from it: each of its values is moved twice."""


def spared(analysis: Analysis, node: fx.Node, keep: Tensor, comes: Tensor) -> Tensor:
    """Return what is to exist of a result: all that comes, if selecting from it does not pay.

    Args:
        analysis: with `move_cost`.
        node: whose result it is.
        keep: mask of what has to exist.
        comes: mask of what is there without any selection.
    """
    spare = comes & ~keep
    if not keep.any() or not spare.any():
        return keep
    saved = int(spare.sum()) * work_behind(analysis, node)
    return keep | spare if saved <= analysis.move_cost * int(keep.sum()) else keep


def cheaper_computed(analysis: Analysis, node: fx.Node, source: fx.Node) -> Tensor | None:
    """Return constants of an operand that are cheaper computed than filled in, None for none.

    Args:
        analysis: with `move_cost` and what is to exist of the result.
        node: an operation on each element of several operands.
        source: one of them.
    """
    keep, fact = analysis.keep[node], analysis.fact(source)
    there = analysis.wanted(source)
    if fact.static or fact.summary_shape() != keep.shape or not there.any():
        return None
    missing = keep & ~there
    work = int(missing.sum()) * work_before(analysis, source) if missing.any() else 0.0
    return missing if work <= COPIES * analysis.move_cost * int(keep.sum()) else None


def work_before(analysis: Analysis, node: fx.Node) -> float:
    """Return the multiply-accumulates for one more channel at one place; inf if it is not told."""
    rule = analysis.rules.get(node)
    return rule.work(analysis) if rule is not None else float("inf")


def work_behind(analysis: Analysis, node: fx.Node) -> float:
    """Return the multiply-accumulates that one channel causes at one place in what reads it."""
    total = 0.0
    for user in node.users:
        rule = analysis.rules.get(user)
        if rule is None or not isinstance(analysis.values.get(user), Fact):
            continue
        own = rule.work_of_input(analysis)
        if own is not None:
            total += own
        elif len(rule.sources(analysis)) == 1:
            total += work_behind(analysis, user)
    return total
