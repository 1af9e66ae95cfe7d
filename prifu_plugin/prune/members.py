"""The modules, parameters and buffers of the pruned model while it is being built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.device import like_of


class Members:
    """Members by path, under their original paths where these are free.

    Args:
        root: the original model, whose names are not taken for anything else.
        graph: the new graph, which reads them.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.graph = graph
        self.found: dict[str, Any] = {}
        self.origins: dict[str, Any] = {}
        self.constants = self.fresh("constants")

    def layer(self, path: str, origin: Any, make: Callable[[], nn.Module]) -> str:
        """Return where a layer is; calls of one layer that are sliced alike share the slice.

        Args:
            path: of the original.
            origin: how it is sliced.
            make: makes the slice, if it is not there.
        """
        count, place = 0, path
        while place in self.found and self.origins[place] != (path, origin):
            count += 1
            place = f"{path}_call{count}"
        if place not in self.found:
            self.found[place], self.origins[place] = make(), (path, origin)
        return place

    def add(self, path: str, value: Any, origin: Any = None) -> fx.Node:
        """Read a member; another path is found if there stands what has another origin."""
        origin = origin or path
        if self._is_taken(path, origin):
            path = self.fresh(f"{path.replace('.', '_')}_again", origin)
        self.found.setdefault(path, value)
        self.origins[path] = origin
        return self.graph.get_attr(path)

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        """Read a constant."""
        return self.add(f"{self.constants}.{name}", value)

    def fresh(self, path: str, origin: Any = None) -> str:
        """Return a path that the original model does not have, nor the new one for other values."""
        while hasattr(self.root, path.partition(".")[0]) or self._is_taken(path, origin):
            path = "_" + path
        return path

    @property
    def dtype(self) -> torch.dtype:
        """Type that the model computes in."""
        return like_of(self.root).dtype

    def cast(self, value: Tensor) -> Tensor:
        """Bring a value to the type of the model's parameters."""
        like = like_of(self.root)
        return value.to(like.device, like.dtype)

    def read(self) -> dict[str, Any]:
        """Return the members that the graph reads."""
        used = {str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr")}
        return {path: member for path, member in self.found.items() if path in used}

    def _is_taken(self, path: str, origin: Any) -> bool:
        return path in self.found and self.origins.get(path) != origin


def like(original: Any, value: Tensor) -> Any:
    """Return a copy of a value, a parameter if the original is one."""
    if isinstance(original, nn.Parameter):
        return nn.Parameter(value.detach().clone(), original.requires_grad)
    return value.detach().clone()
