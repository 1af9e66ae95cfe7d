"""Recognize data movement: an operation that commutes with every relabelling of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.nodes import mapped
from prifu_plugin.prune.rules.base import Analysis, run, run_with_gradients
from prifu_plugin.prune.rules.elsewhere import elsewhere, signature
from prifu_plugin.prune.rules.loose import changed, loose_numbers
from prifu_plugin.prune.rules.origins import axes_of, channel_of, relation_of
from prifu_plugin.prune.rules.passing import is_movement_by_name, passes_everything
from prifu_plugin.prune.seen import seen


@dataclass(frozen=True)
class Moved:
    """Where the elements of one result came from: labels of the source, 0 for a padded zero.

    Attributes:
        labels: in the analysed run.
        axes: dimensions along which the source's channels vary, of the same size at every size
            of the input.
        mixed: channels vary along a dimension that they share with the batch or with space; they
            are no channels of this result.
        other: labels in the run at other sizes, if there was one.
        loose: they follow from sizes, so that others may be moved elsewhere at sizes that no run
            has seen, though not to other channels.
        padded: at some sizes there are, or may be, zeros around them, at others not.
    """

    labels: Tensor
    axes: tuple[int, ...]
    mixed: bool
    other: Tensor | None
    loose: bool = False
    padded: bool = False


@dataclass(frozen=True)
class Start:
    """Labels at the beginning of a movement, in the analysed run and in the other.

    Attributes:
        labels: what the operation is run on.
        shape: of the tensor they count.
        after: id of the movement that left them; 0 for fresh ones.
    """

    labels: Tensor
    shape: tuple[int, ...]
    after: int = 0


def starts(node: fx.Node, fact: Fact) -> tuple[Start, ...]:
    """Return fresh labels of a tensor, one for each run."""
    shapes = [fact.shape]
    if seen(node).other_shape is not None:
        shapes.append(seen(node).other_shape)
    return tuple(Start(_count(shape), shape) for shape in shapes)


def moved_labels(
    analysis: Analysis, node: fx.Node, source: fx.Node, fact: Fact, begin: tuple[Start, ...]
) -> tuple[Moved, ...]:
    """Run a node on labels and on relabelled values; return where everything came from.

    Args:
        analysis: the facts so far.
        node: the operation.
        source: the only tensor it reads.
        fact: of the tensor whose labels `source` holds.
        begin: those labels, in each run.

    Returns:
        One entry for each result; none if the operation does anything but move, or moves the
        channels of another size otherwise. Blocks that repeat share theirs.
    """
    key = _key(analysis, node, source, fact, begin)
    if key is None:
        return _moved(analysis, node, source, fact, begin)
    if key not in analysis.movements:
        analysis.movements[key] = _moved(analysis, node, source, fact, begin)
    found: tuple[Moved, ...] = analysis.movements[key]
    return found


def _key(
    analysis: Analysis, node: fx.Node, source: fx.Node, fact: Fact, begin: tuple[Start, ...]
) -> Hashable | None:
    """Return all that a movement depends on, or None if that cannot be told."""
    if node.op == "call_module":
        return None
    loose = loose_numbers(analysis, node)
    leaves: list[Any] = []

    def said_of(n: fx.Node) -> Any:
        if n is source:
            return "%source"
        return analysis.values[n], seen(n).other_shape, seen(n).other_example, n in loose

    args = mapped((node.args, node.kwargs), said_of)
    fx.node.map_aggregate(args, leaves.append)
    if not all(isinstance(leaf, _PLAIN) for leaf in leaves):
        return None
    said = (node.op, str(node.target), id(node.target), repr(args), fact.axes)
    return (*said, *((start.shape, start.after) for start in begin))


_PLAIN = (int, float, str, torch.dtype, torch.Size, type(None), type(Ellipsis))


def _moved(
    analysis: Analysis, node: fx.Node, source: fx.Node, fact: Fact, begin: tuple[Start, ...]
) -> tuple[Moved, ...]:
    runs = []
    for index, start in enumerate(begin):
        labels = _labels(analysis, node, source, start, index)
        if labels is None:
            return ()
        runs.append(labels)
    others = _changed(analysis, node, source, begin[0])
    if others is None:
        return ()
    if len({len(labels) for labels in (*runs, *others)}) != 1:
        return ()
    found = []
    for place in range(len(runs[0])):
        changes = [labels[place].to(runs[0][place].dtype) for labels in others]
        moved = _combined([labels[place] for labels in runs], fact, begin, changes)
        if moved is None:
            return ()
        found.append(moved)
    if others or begin[0].after:
        return tuple(found)
    far = elsewhere(analysis, node, source, fact.axes)
    if far == []:  # not known
        return tuple(replace(one, loose=True, padded=True) for one in found)
    if far is None or len(far) != len(found):
        return tuple(found)
    count = math.prod(begin[0].shape)
    return tuple(
        one
        if there == signature(one.labels, count)
        else replace(one, loose=True, padded=one.padded or there.padded)
        for one, there in zip(found, far, strict=True)
    )


def _changed(
    analysis: Analysis, node: fx.Node, source: fx.Node, start: Start
) -> list[list[Tensor]] | None:
    """Return the labels with other numbers in the place of those that follow from sizes.

    Numbers that the operation does not take are left out: those of the input decide about them.
    None if with another number it does anything but move, as padding by 0.5 of a width of 0.
    """
    found = []
    size = math.prod(start.shape)
    table = _table(size)
    for instead in changed(analysis, loose_numbers(analysis, node)):

        def on(value: Tensor, instead: dict[fx.Node, Any] = instead) -> list[Tensor]:
            def given(n: fx.Node) -> Any:
                return value if n is source else instead.get(n, analysis.values[n])

            return _tensors(run(analysis, node, given))

        try:
            moved, again = on(start.labels), on(table[start.labels.long()])
        except Exception:  # noqa: BLE001 - such a number cannot occur
            continue
        if not moved or not all(map(torch.Tensor.numel, moved)):
            continue
        if any(not _are_labels(m, size) for m in moved):
            return None
        if any(not torch.equal(a, table[m.long()]) for m, a in zip(moved, again, strict=True)):
            return None
        found.append(moved)
    return found


def _count(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


def _labels(
    analysis: Analysis, node: fx.Node, source: fx.Node, start: Start, index: int
) -> list[Tensor] | None:
    size = math.prod(start.shape)
    table = _table(size)
    try:
        moved = _tensors(_on(analysis, node, source, start.labels, index))
        again = _tensors(_on(analysis, node, source, table[start.labels.long()], index))
    except Exception:  # noqa: BLE001 - an operation that refuses labels is no movement
        return None
    if not moved or any(not _are_labels(m, size) for m in moved):
        return None
    if any(not torch.equal(a, table[m.long()]) for m, a in zip(moved, again, strict=True)):
        return None

    def other(value: Tensor) -> list[Tensor]:
        return _tensors(_on(analysis, node, source, value, index, run_with_gradients))

    try:
        moves = is_movement_by_name(analysis, node) or passes_everything(other, start.labels, moved)
    except Exception:  # noqa: BLE001 - an operation that refuses values is no movement
        return None
    if not moves:
        return None
    # Half the memory of int64; there are many, and no tensor here has 2**31 values.
    return [m.int() if size < 2**31 - 1 else m.long() for m in moved]


def _combined(
    runs: list[Tensor], fact: Fact, begin: tuple[Start, ...], changes: list[Tensor]
) -> Moved | None:
    """Find the channel dimensions of a result; None if the runs disagree about them.

    Args:
        runs: labels of the result, in each run.
        fact: of what they are labels of.
        begin: those, in each run.
        changes: labels of the result in the first run, with other numbers from sizes.
    """
    every = [*runs, *changes]
    shapes = [*(start.shape for start in begin), *[begin[0].shape] * len(changes)]
    if len({labels.ndim for labels in every}) != 1:
        return None
    channels = [
        [channel_of(labels, shape, axis) for axis in fact.axes]
        for labels, shape in zip(every, shapes, strict=True)
    ]
    varying = {
        dim
        for indices, labels in zip(channels, every, strict=True)
        for index in indices
        for dim in axes_of(index, labels == 0)
    }
    axes = tuple(d for d in sorted(varying) if len({labels.shape[d] for labels in every}) == 1)
    mixed = len(axes) < len(varying)
    if mixed and changes:
        return None
    related = [
        relation_of(labels, indices, [shape[axis] for axis in fact.axes], axes)
        for labels, indices, shape in zip(every, channels, shapes, strict=True)
    ]
    zero = math.prod(begin[0].shape[axis] for axis in fact.axes)
    values = [pairs[pairs % (zero + 1) != zero] for pairs in related]
    padded = any(not torch.equal(pairs, related[0]) for pairs in related)
    padded |= bool(changes) and all(torch.equal(labels, runs[0]) for labels in changes)
    if any(not torch.equal(pairs, values[0]) for pairs in values) or (padded and mixed):
        return None
    other = runs[1] if len(runs) > 1 else None
    return Moved(runs[0], axes, mixed, other, bool(changes), padded)


_TABLES = [torch.zeros(1, dtype=torch.float64)]


def _table(size: int) -> Tensor:
    """Return a random signed value for each label, 0 for label 0; drawn once, for speed."""
    if len(_TABLES[0]) <= size:
        generator = torch.Generator().manual_seed(1)
        _TABLES[0] = torch.randn(2 * size + 1, dtype=torch.float64, generator=generator)
        _TABLES[0][0] = 0.0
    return _TABLES[0][: size + 1]


def _on(
    analysis: Analysis,
    node: fx.Node,
    source: fx.Node,
    value: Tensor,
    index: int,
    how: Callable[..., Any] = run,
) -> Any:
    def given(n: fx.Node) -> Any:
        if n is source:
            return value
        return analysis.values[n] if index == 0 else seen(n).other_example

    return how(analysis, node, given)


def _tensors(result: Any) -> list[Tensor]:
    items = result if isinstance(result, tuple | list) else [result]
    if not all(isinstance(i, Tensor) and i.dtype == torch.float64 for i in items):
        return []
    return [item.clone() for item in items]


def _are_labels(values: Tensor, size: int) -> bool:
    whole = torch.isfinite(values) & (values == values.round()) & (values >= 0) & (values <= size)
    return values.ndim > 0 and values.numel() > 0 and bool(whole.all())
