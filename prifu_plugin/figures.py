"""New matplotlib figures, outside pyplot's global state."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'prifu_plugin[audit]'") from error
    return Figure(figsize=(width, height), layout="constrained")
