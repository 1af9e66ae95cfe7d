"""Augmented assignments to proxies: `y += z` writes into a tensor, under all of its names.

The proxies of torch.fx know `y + z` only, and Python falls back to it: every other name of the
tensor would keep the old value. To a number, `+=` is no more than `+`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

AUGMENTED: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
"""Operators that write into their first operand, if it is a tensor, and their pure twins."""


class Augmented:
    """A proxy that knows whether it stands for a tensor, and can be written into then."""

    tracer: Any

    def is_tensor(self) -> bool:
        """Whether it certainly stands for a tensor."""
        raise NotImplementedError

    def _augmented(self, into: Callable[..., Any], other: Any) -> Any:
        """Record an operator, the one that writes if there is a tensor to write into."""
        target = into if self.is_tensor() else AUGMENTED[into]
        return self.tracer.create_proxy("call_function", target, (self, other), {})


def _augmenting(into: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self._augmented(into, other)


for _into in AUGMENTED:
    setattr(Augmented, f"__{_into.__name__}__", _augmenting(_into))
