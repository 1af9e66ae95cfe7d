"""Layers that are called several times: their calls agree on one slice, or weights multiply.

If any call of a shared layer needs a channel, every call that is needed at all computes it; if any
call keeps it, every call keeps it. A pass is repeated until its masks do not grow any more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from torch import Tensor, fx

from prifu_plugin.filter import along
from prifu_plugin.prune.facts import channels_of

if TYPE_CHECKING:
    from prifu_plugin.prune.rules.base import Analysis


class Agreement:
    """The channels that the calls of each layer agree on so far.

    Args:
        analysis: with rules filled in.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.lines: dict[Hashable, Tensor] = {}
        self.changed = False

    def join(self, node: fx.Node, mask: Tensor) -> Tensor:
        """Widen a mask of a call to what other calls asked for; an empty one stays empty.

        Args:
            node: any node.
            mask: over its channels, shaped like its summary.
        """
        key = self.analysis.layer_key(node)
        if key is None or len(self.analysis.calls[key]) == 1 or not mask.any():
            return mask
        dim = self.analysis.rules[node].sliced_dim(self.analysis)
        line = channels_of(mask, dim)
        known = self.lines.get(key)
        if known is not None and len(known) != len(line):
            return mask
        joined = line if known is None else known | line
        if known is None or not joined.equal(known):
            self.lines[key] = joined
            self.changed = True
        return mask | (along(joined, mask.ndim, dim) & mask.any(dim, keepdim=True))


def until_agreed(analysis: Analysis, one_pass: Callable[[Agreement], None]) -> None:
    """Repeat a pass until no call asks for more than the others have.

    Args:
        analysis: with rules filled in.
        one_pass: joins the masks of calls; it only ever widens them from pass to pass.
    """
    agreement = Agreement(analysis)
    while True:
        agreement.changed = False
        one_pass(agreement)
        if not agreement.changed:
            return
