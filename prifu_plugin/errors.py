"""The exceptions and warnings of prifu_plugin.

::

    PrifuError
    ├── ConfigError (ValueError)        an argument that cannot be right
    ├── NoSiteError (ValueError)        no normalization call, or no match for a pattern
    ├── OrderError (RuntimeError)       the right call at the wrong time
    ├── CaptureError (RuntimeError)     a model that cannot be followed as a graph
    ├── FilterError (RuntimeError)      filter weights that are not finite, states that do not fit
    └── VerificationError (RuntimeError)   a pruned model that computes something else
    PrifuWarning (UserWarning)

Each message says what happened, where (module path, type, shape), why, and what to type next.
"""

from __future__ import annotations


class PrifuError(Exception):
    """Base of every error raised by prifu_plugin."""


class ConfigError(PrifuError, ValueError):
    """An argument outside its range."""


class NoSiteError(PrifuError, ValueError):
    """A model, or a pattern, with no normalization call to filter."""


class OrderError(PrifuError, RuntimeError):
    """A call that comes too early or too late, such as an optimizer built before wrap."""


class CaptureError(PrifuError, RuntimeError):
    """A model whose graph could not be captured, or does not compute what the model does."""


class FilterError(PrifuError, RuntimeError):
    """Filter weights or gradients that are not finite, or a saved state that does not fit."""


class VerificationError(PrifuError, RuntimeError):
    """A pruned model that differs from the filtered one; nothing was changed."""


class PrifuWarning(UserWarning):
    """Something that works but is probably not what was meant."""


def first_line(error: BaseException) -> str:
    r"""Return what an error says in one line: its first, or its class where it says nothing.

    Example:
        >>> first_line(ValueError("too long\nby two")), first_line(KeyError())
        ('too long', 'KeyError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0]
