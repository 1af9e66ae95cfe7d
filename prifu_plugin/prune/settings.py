"""How prune works, as the user asked for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PruneSettings:
    """What prune was asked for.

    Attributes:
        round_to: widths become multiples of it.
        move_cost: multiply-accumulates that moving one value is taken to cost.
        verify: compare with the filtered model.
        seed: of the inputs it is compared on.
    """

    round_to: int = 1
    move_cost: float = 0.0
    verify: bool = True
    seed: int = 0
