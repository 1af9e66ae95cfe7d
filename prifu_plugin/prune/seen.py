"""What runs of a graph have shown of its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Seen:
    """What the runs of a graph have shown of one node.

    Attributes:
        shape: of a tensor, (1,) for one without dimensions; a list of shapes for several tensors;
            () for anything else.
        several: it is a tuple or list of tensors.
        nested: it is another structure with tensors in it.
        zero_dim: it is a tensor without dimensions.
        example: its value; of a tensor an empty one of its type, of a structure with tensors None.
        static: its value, tensors, if it follows from parameters alone and is the same in all runs.
        varies: it follows from parameters and sizes.
        other_shape: in the run at other sizes; None if there was none.
        other_example: in that run.
        moves: it is a number, or several, that may be another for inputs that no run has seen: it
            follows from a size that was not the same in both runs, or from values of a tensor.
    """

    shape: Any
    several: bool
    nested: bool
    zero_dim: bool
    example: Any
    static: Any = None
    varies: bool = False
    other_shape: Any = None
    other_example: Any = None
    moves: bool = False

    @property
    def is_static(self) -> bool:
        """Whether it follows from parameters alone."""
        return self.static is not None


def seen(node: fx.Node) -> Seen:
    """Return what was seen of a node; the graph must have been run by `record_examples`."""
    found: Seen = node.meta[_SEEN]
    return found


def was_seen(node: fx.Node) -> bool:
    """Whether a node was run: those that a pass adds are not, until it runs the graph again."""
    return _SEEN in node.meta


def note(node: fx.Node, what: Seen) -> None:
    """Keep what was seen of a node, for copies of its graph too."""
    node.meta[_SEEN] = what


_SEEN = "prifu_seen"
