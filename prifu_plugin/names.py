"""Names inside a model: which are of filters, and what is at one."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn

CHILD = "prifu"
"""Name of a filter in the module it follows, and so the last part but one of W's key."""

WHOLE = "_whole"
"""How the name of a parameter ends that a forward reads beside its layer, which has a slice."""

SIZE_QUERIES = {
    *("shape", "size", "numel", "nelement", "dim", "ndim", "ndimension", "dtype", "device"),
    *("is_cuda", "requires_grad", "is_floating_point", "layout"),
}
"""What may be asked of a tensor without its values, and a pruned model answers as the original."""
LAYOUT_QUERIES = {"stride", "is_contiguous"}
"""What needs no values either, but is another answer where channels are gone."""


def is_of_filter(name: str) -> bool:
    """Whether a parameter or buffer of this name belongs to a filter.

    Example:
        >>> is_of_filter("layer1.0.bn1.prifu.weight"), is_of_filter("layer1.0.bn1.weight")
        (True, False)
    """
    return f".{CHILD}." in f".{name}"


def value_at(root: nn.Module, path: str) -> Any:
    """Return what is at a dotted path of a module.

    Example:
        >>> value_at(nn.Sequential(nn.Linear(2, 3)), "0.bias").shape
        torch.Size([3])
    """
    return operator.attrgetter(path)(root)
