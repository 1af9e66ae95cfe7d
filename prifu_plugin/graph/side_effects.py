"""What a forward does beside its operations, which no graph holds: refused while it is traced."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch.amp.autocast_mode import autocast
from torch.utils._python_dispatch import TorchDispatchMode

from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.patches import patched


@contextmanager
def only_operations(
    computing: Callable[[], bool] = lambda: False, *, in_training: bool = False
) -> Iterator[None]:
    """Refuse what a trace would lose without a word, for the length of a trace.

    That is: regions without gradients and of another precision, and random numbers drawn by the
    forward itself, which would be the same ones for ever.

    Args:
        computing: whether values are computed now, rather than traced.
        in_training: the graph is to be trained under whatever context the caller has; it must then
            not ask for that context either.

    Raises:
        CaptureError: naming what it does.

    Example:
        >>> with only_operations(), torch.no_grad():
        ...     pass
        Traceback (most recent call last):
        ...
        prifu_plugin.errors.CaptureError: it switches gradients on or off
    """
    before = _drawn()
    with torch.enable_grad(), ExitStack() as stack:
        for home, name, words, harmless in _LOST:
            kept = getattr(home, name)
            refusing = _refusing(kept, words, computing, harmless, in_training)
            stack.enter_context(patched(home, name, refusing))
        if in_training:
            for name, words in _ASKED.items():
                asked = _refusing(getattr(torch, name), words, computing)
                stack.enter_context(patched(torch, name, asked))
        with _Draws() as draws:
            yield
    now = _drawn()
    if now[1:] != before[1:] or (draws.seen and now != before):
        raise CaptureError("it draws random numbers itself, which a graph would keep for ever")


def _no_change(mode: Any, in_training: bool) -> bool:
    """Whether setting the gradient mode, or entering autocast, leaves it as it is here."""
    if isinstance(mode, autocast):
        return not in_training and not mode._enabled
    return mode is True and not in_training


def _never(mode: Any, in_training: bool) -> bool:
    return False


_LOST: tuple[tuple[Any, str, str, Callable[[Any, bool], bool]], ...] = (
    (torch._C, "_set_grad_enabled", "it switches gradients on or off", _no_change),
    (torch.inference_mode, "__enter__", "it has a region in inference mode", _never),
    (autocast, "__enter__", "it has a region under autocast", _no_change),
    (torch, "manual_seed", "it seeds random numbers itself", _never),
)


_ASKED = {
    "is_grad_enabled": "it asks for gradients, or switches them",
    "is_inference_mode_enabled": "it asks for inference mode",
    "is_autocast_enabled": "it asks for autocast",
}


def _refusing(
    kept: Any,
    words: str,
    computing: Callable[[], bool],
    harmless: Callable[[Any, bool], bool] = _never,
    in_training: bool = False,
) -> Callable[..., Any]:
    def ask(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if computing() or harmless(given[0] if given else None, in_training):
            return kept(*args, **kwargs)
        return _refuse(words)

    return ask


def _refuse(words: str) -> NoReturn:
    raise CaptureError(words)


class _Draws(TorchDispatchMode):
    """Note whether this thread draws with torch's generator, which others share."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))


def _drawn() -> tuple[Any, ...]:
    """Return where the generators of random numbers stand."""
    _, keys, at, *rest = np.random.get_state()  # noqa: NPY002 - what a forward may draw from
    state = bytes(torch.get_rng_state().numpy().tobytes())
    return state, random.getstate(), bytes(np.asarray(keys).tobytes()), at, *rest
