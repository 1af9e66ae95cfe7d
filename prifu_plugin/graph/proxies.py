"""Proxies of torch.fx that carry their value in one example run; `sized` traces with them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from prifu_plugin.graph.augmented import AUGMENTED, Augmented

_len = len


class SizedProxy(Augmented, fx.Proxy):
    """A node and its value in the example run.

    Attributes:
        value: of the example run.
        of_values: whether it was computed from the values of tensors, if it is no tensor itself.
    """

    value: Any
    of_values: bool
    tracer: Any

    def carrying(self, value: Any, of_values: bool = False) -> SizedProxy:
        """Set the value."""
        self.__dict__.update(value=value, of_values=of_values)
        return self

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__"):
            raise AttributeError(k)
        value = self.value
        if k in ("type", "index") and isinstance(value, torch.device):
            return getattr(value, k)  # a context such as autocast takes no proxy
        if not hasattr(value, k):
            raise AttributeError(f"'{type(value).__name__}' object has no attribute '{k}'")
        return _SizedAttribute(self, k)

    def __iter__(self) -> Iterator[Any]:
        create = self.tracer.create_proxy
        return iter(
            [create("call_function", operator.getitem, (self, at), {}) for at in range(len(self))]
        )

    def __getitem__(self, key: Any) -> Any:
        part = self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})
        if isinstance(self.value, Tensor) and not reads_tensors(key):  # which would copy
            part.__dict__["part_of"] = self, key  # what is written then stays there
            self.tracer.is_part(part.node, self.node, key)
        return part

    def is_tensor(self) -> bool:
        """Whether it stands for a tensor."""
        return isinstance(self.value, Tensor)

    def _augmented(self, into: Callable[..., Any], other: Any) -> Any:
        """Record an operator; what is written into a part is written into the whole."""
        if "part_of" not in self.__dict__ or not self.is_tensor():
            return super()._augmented(into, other)
        whole, key = self.__dict__["part_of"]
        made = self.tracer.create_proxy("call_function", AUGMENTED[into], (self, other), {})
        whole[key] = made
        made.__dict__.update(is_at=(whole.node, key), part_of=(whole, key))
        self.tracer.is_part(made.node, whole.node, key)
        return made

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write into a constant made of sizes alone, or stand for the changed tensor."""
        at = value.__dict__.get("is_at") if isinstance(value, SizedProxy) else None
        if at is not None and at[0] is self.node and at[1] is key:
            return  # x[key] += y hands x[key] what was written into it
        tensor = isinstance(value, SizedProxy) and isinstance(value.value, Tensor)
        if "sizes" not in self.__dict__ or self.node.users or tensor:
            written = written_to(self, key, value)
            if tensor and written.node is value.node:
                written = written.clone()
            self.tracer.overwrites(self.node, self.value, key)
            self.__dict__.update(node=written.node, value=written.value)
            return
        key, value, _ = map_aggregate((key, value, self.__dict__["sizes"]), plain)
        if self.node.op != "get_attr":
            self.__dict__["value"] = self.value.clone()
            made = self.node
            self.__dict__["node"] = self.tracer.create_arg(self.value)
            made.graph.erase_node(made)
        self.value[key] = value

    def __len__(self) -> int:
        if isinstance(self.value, Tensor):
            self.tracer.decided(self.size(0), int)
        elif "parted" in self.__dict__:
            self.tracer.decided(number_of_parts(*self.__dict__["parted"]), int)
        elif not _is_of_fixed_length(self.value) and reads_tensors(self):
            count = self.tracer.create_proxy("call_function", _len, (self,), {})
            self.tracer.decided(count.carrying(len(self.value)), int)
        return len(self.value)

    def __index__(self) -> int:
        return int(self._decided(operator.index))

    def __int__(self) -> int:
        return int(self._decided(int))

    def __float__(self) -> float:
        return float(self._decided(float))

    def plain(self) -> Any:
        """Return the size itself, under a guard."""
        return self._decided(lambda value: value)

    def __hash__(self) -> int:
        """Return that of the size, under a guard; tensors, and devices, are known by identity."""
        if self.tracer.finished or isinstance(self.value, Tensor | torch.device):
            return object.__hash__(self)
        return hash(self.plain())

    def __eq__(self, other: object) -> Any:
        """Record a comparison; a proxy that a cache has kept is nothing but itself."""
        of_another = isinstance(other, SizedProxy) and other.tracer is not self.tracer
        if self.tracer.finished or of_another:
            return self is other
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __repr__(self) -> str:
        return self._text(repr)

    def __str__(self) -> str:
        return self._text(str)

    def __format__(self, form: str) -> str:
        return self._text(lambda value: format(value, form))

    def _text(self, how: Callable[[Any], str]) -> str:
        if self.tracer.finished or isinstance(self.value, torch.device):
            return f"{type(self).__name__}({self.node.name})"
        return str(self.tracer.texts.write(self.node.name, lambda: self._decided(how)))

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __round__(self, digits: int | None = None) -> Any:
        given = (self,) if digits is None else (self, digits)
        return self.tracer.create_proxy("call_function", round, given, {})

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **settings: Any) -> Any:
        """Let numpy compute with sizes."""
        given = [plain(x) if isinstance(x, SizedProxy) else x for x in inputs]
        return getattr(ufunc, method)(*given, **settings)

    def _decided(self, how: Callable[[Any], Any]) -> Any:
        return self.tracer.decided(self, how)


class _SizedAttribute(SizedProxy):
    """What is asked of a proxy: a method if it is called, a node if it is used."""

    def __init__(self, root: SizedProxy, attr: str) -> None:
        self.__dict__.update(root=root, attr=attr, tracer=root.tracer, _proxy=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The node that reads the attribute, made when it is first used."""
        node: fx.Node = self._read().node
        return node

    @property
    def value(self) -> Any:
        """Of the example run."""
        return self._read().value

    @property
    def of_values(self) -> bool:  # type: ignore[override]
        """Whether it follows from the values of tensors."""
        return bool(self._read().of_values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        in_place = self.attr.endswith("_") and not self.attr.endswith("__")
        if in_place and "part_of" in self.root.__dict__:
            whole, key = self.root.__dict__["part_of"]
            whole[key] = self._to_write(args, kwargs)
            return whole[key]
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)

    def _to_write(self, args: Any, kwargs: Any) -> Any:
        """Return what an operation in place leaves, without side effect."""
        if self.attr == "zero_":
            return 0
        if self.attr in ("fill_", "copy_"):
            return args[0] if args else next(iter(kwargs.values()))
        pure = self.attr.removesuffix("_")
        if not hasattr(Tensor, pure):
            raise TraceError(f"'{self.root.node.name}' is overwritten in place ({self.attr}).")
        return self.tracer.create_proxy("call_method", pure, (self.root, *args), kwargs)

    def _read(self) -> Any:
        if self._proxy is None:
            made = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
            self.__dict__["_proxy"] = made
        return self._proxy


def _is_of_fixed_length(value: Any) -> bool:
    """Whether it is a shape, or named results, as those of torch.topk."""
    return isinstance(value, torch.Size) or hasattr(value, "n_fields") or hasattr(value, "_fields")


def number_of_parts(how: str, args: Any, kwargs: Any) -> Any:
    """Return in how many parts split, chunk or unbind take a tensor, as a proxy or a number."""
    x, *rest = args if args else (kwargs["input"],)
    if how == "unbind":
        return x.size(rest[0] if rest else kwargs.get("dim", 0))
    names = ("split_size_or_sections", "split_size", "chunks")
    by = rest[0] if rest else next(kwargs[name] for name in names if name in kwargs)
    if isinstance(value_of(by), tuple | list):
        return len(by)
    size = x.size(rest[1] if len(rest) > 1 else kwargs.get("dim", 0))
    step = -(-size // by) if how == "chunk" else by
    return -(-size // step)


def written_to(x: Any, key: Any, value: Any) -> Any:
    """Return a tensor with a part of it replaced, as nodes without side effect.

    Args:
        x: proxy of the tensor.
        key: what stands in the brackets: slices of step 1 and sizes, or a mask for a number.
        value: proxy of a tensor that broadcasts to the part, or a number.

    Raises:
        TraceError: for any other key.
    """
    keys = key if isinstance(key, tuple) else (key,)
    rank = x.value.ndim
    if any(part is Ellipsis for part in keys):
        at = next(at for at, part in enumerate(keys) if part is Ellipsis)
        keys = (*keys[:at], *[slice(None)] * (rank - len(keys) + 1), *keys[at + 1 :])
    create = x.tracer.create_proxy
    for dim, part in enumerate(keys):
        if isinstance(part, slice) and part == slice(None):
            continue
        if _is_mask(part) and len(keys) == 1 and not isinstance(value_of(value), Tensor):
            mask = part[(..., *[None] * (rank - part.value.ndim))]
            return create("call_method", "masked_fill", (x, mask, value), {})
        if isinstance(part, slice):
            chosen, rest = x[(slice(None),) * dim + (part,)], _rest(dim, slice(None), keys)
            where: tuple[Any, ...] = (
                dim,
                *map(plain, (part.start, part.stop)),
                plain(part.step) or 1,
            )
            inner = written_to(chosen, rest, value)
            return create("call_function", torch.slice_scatter, (x, inner, *where), {})
        if isinstance(plain(part), int) and not isinstance(part, bool):
            place = plain(part)
            inner = written_to(x.select(dim, place), _rest(dim, None, keys), value)
            return create("call_function", torch.select_scatter, (x, inner, dim, place), {})
        raise TraceError(f"'{x.node.name}' is written to at a {type(value_of(part)).__name__}.")
    if not isinstance(value_of(value), Tensor):
        return create("call_function", torch.full_like, (x, value), {})
    while value_of(value).ndim > rank and value_of(value).shape[0] == 1:
        value = value.squeeze(0)
    same = value_of(value).shape == x.value.shape
    value = value if value_of(value).dtype == x.value.dtype else value.type_as(x)
    return value if same else value.expand_as(x)


def _is_mask(part: Any) -> bool:
    return isinstance(value_of(part), Tensor) and value_of(part).dtype == torch.bool


def _rest(dim: int, seen: slice | None, keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the key of the part that a dimension's own key has chosen."""
    return (*keys[:dim], *(() if seen is None else (seen,)), *keys[dim + 1 :])


def plain(argument: Any) -> Any:
    """Return a size itself, under a guard."""
    return argument.plain() if isinstance(argument, SizedProxy) else argument


def value_of(argument: Any) -> Any:
    """Return the value of a proxy, and anything else as it is."""
    return argument.value if isinstance(argument, SizedProxy) else argument


def reads_tensors(arguments: Any) -> bool:
    """Whether an argument is a tensor, or a number made of the values of one."""
    found: list[bool] = []

    def look(argument: Any) -> Any:
        if isinstance(argument, SizedProxy):
            leaves = pytree.tree_leaves(argument.value)
            found.append(argument.of_values or any(isinstance(v, Tensor) for v in leaves))
        return argument

    map_aggregate(arguments, look)
    return any(found)
