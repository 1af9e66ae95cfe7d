"""Inputs for the runs of prune: what the user showed, at other batch sizes and other sizes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prifu_plugin.arguments import tensors
from prifu_plugin.device import like_of
from prifu_plugin.errors import ConfigError, first_line
from prifu_plugin.graph.state import input_shapes
from prifu_plugin.graph.undisturbed import run_undisturbed
from prifu_plugin.prune.other_shapes import (
    Change,
    all_of_image,
    between,
    between_signals,
    by_patches,
    channels_last,
    clips,
    doubled,
    far,
    far_signals,
    far_tokens,
    fewer_tokens,
    framed,
    grown,
    longer,
    more_tokens,
    near,
    odd,
    shrunk,
    skewed,
)

FLOAT = "float"
"""Kind of an input in the model's own floating-point type."""


@dataclass(frozen=True)
class Inputs:
    """What a model takes, one entry for each input.

    Attributes:
        shapes: with the batch first.
        kinds: "float" for the model's own type, else the name of a dtype.
        ends: for integers, one above the largest value that may occur.
        begins: for integers, the least one.
        spans: for numbers, the least and the largest that were shown, and whether all were whole.
        within: whether to draw numbers from there, rather than Gaussian ones.
        fixed: whether no other sizes are to be tried.

    Example:
        >>> inputs = Inputs.of(torch.zeros(2, 3, 8, 8))
        >>> inputs.batch(5).shapes
        ((5, 3, 8, 8),)
    """

    shapes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    ends: tuple[int, ...]
    begins: tuple[int, ...] = ()
    spans: tuple[tuple[float, float, bool], ...] = ()
    within: bool = False
    fixed: bool = False

    @classmethod
    def of(cls, examples: Any) -> Inputs:
        """Describe example inputs: a tensor, or a tuple or list of them."""
        listed = tensors("example_inputs", examples)
        if any(x.is_meta for x in listed):
            raise ConfigError("example_inputs are on the meta device: pass a batch with values.")
        if any(x.is_complex() for x in listed):
            raise ConfigError(
                "example_inputs are complex: let the model take torch.view_as_real(x)."
            )
        if not listed or any(x.ndim == 0 or x.numel() == 0 for x in listed):
            raise ConfigError("example_inputs is empty: pass a batch, such as torch.zeros(2, ...).")
        return cls(
            tuple(tuple(x.shape) for x in listed),
            tuple(_kind(x) for x in listed),
            tuple(1 if x.is_floating_point() else int(x.max()) + 1 for x in listed),
            tuple(0 if x.is_floating_point() else int(x.min()) for x in listed),
            tuple(map(_span, listed)),
        )

    @classmethod
    def for_model(cls, model: nn.Module, examples: Any = None) -> Inputs:
        """Describe example inputs; without any, those of the last forward pass or of timm.

        Raises:
            ConfigError: if neither is known.
        """
        if examples is not None:
            return cls.of(examples)
        shapes = input_shapes(model)
        if shapes is None:
            raise ConfigError(
                f"The input shape of {type(model).__name__} is unknown: pass example_inputs= a "
                "batch, or run the wrapped model once before."
            )
        return cls.floats(shapes)

    @classmethod
    def floats(cls, shapes: Sequence[tuple[int, ...]]) -> Inputs:
        """Describe floating-point inputs."""
        return cls(tuple(shapes), (FLOAT,) * len(shapes), (1,) * len(shapes))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Inputs:
        """Read what `to_dict` wrote."""
        return cls(
            tuple(tuple(s) for s in data["shapes"]),
            tuple(data["kinds"]),
            tuple(data["ends"]),
            tuple(data.get("begins", ())),
            tuple((low, high, bool(whole)) for low, high, whole in data.get("spans", ())),
            bool(data.get("within", False)),
            bool(data.get("fixed", False)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "shapes": [list(s) for s in self.shapes],
            "kinds": list(self.kinds),
            "ends": list(self.ends),
            "begins": list(self.begins),
            "spans": [list(span) for span in self.spans],
            "within": self.within,
            "fixed": self.fixed,
        }

    def batch(self, size: int) -> Inputs:
        """Return the same at another batch size: of the first input, and those that share it."""
        now = self.shapes[0][0]
        changed = ((size, *shape[1:]) if shape[0] == now else shape for shape in self.shapes)
        return replace(self, shapes=tuple(changed))

    def draw(self, model: nn.Module, seed: int) -> list[Tensor]:
        """Draw inputs: numbers Gaussian, or within what was shown; integers uniform."""
        like = like_of(model)
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        begins = self.begins or (0,) * len(self.ends)
        for at, (shape, kind) in enumerate(zip(self.shapes, self.kinds, strict=True)):
            if kind != FLOAT:
                begin, end = begins[at], max(self.ends[at], begins[at] + 1)
                values = torch.randint(begin, end, shape, generator=generator)
                drawn.append(values.to(like.device, getattr(torch, kind)))
            elif self.within:
                low, high, whole = self.spans[at]
                values = low + (high - low) * torch.rand(shape, generator=generator)
                drawn.append((values.round() if whole else values).to(like))
            else:
                drawn.append(torch.randn(shape, generator=generator).to(like))
        return drawn

    def as_shown(self) -> Iterator[Inputs]:
        """Yield the same, drawn within what was shown, if that is more than one number."""
        if any(low < high for low, high, _ in self.spans) and not self.within:
            yield replace(self, within=True)

    def sized(self) -> Iterator[Inputs]:
        """Yield the same at other sizes: what a model takes of them shows what it assumes.

        Images grow one way and shrink the other, by odd numbers first, since much is padded to
        multiples, and by more than 32, so that what is inside differs too; then by 32, or patches
        of 14; or double, one way where that is enough: four times the tokens take sixteen times
        as long. Sequences grow, or shrink where they must not. A model that takes none has its size
        fixed.
        """
        skews = (odd((5, -5)), odd((1, 1)), odd((1, 0)), odd((0, 1)))
        changes: tuple[Change, ...] = (*skews, skewed, grown, channels_last, clips, framed)
        changes = (*changes, by_patches, longer, far_signals, doubled)
        for of_pairs in (far_tokens, more_tokens, fewer_tokens):
            for kinds in (set(self.kinds), set(self.kinds) - {FLOAT}):
                yield from self._changed(far, *changes, of_pairs=of_pairs, kinds=kinds)
        yield from self._changed(all_of_image, far, *changes, fewer_tokens)

    def elsewhere(self) -> Iterator[Inputs]:
        """Yield the same at sizes that are not among the first of `sized`."""
        yield from self._changed(between, between_signals, odd((33, -1)), odd((64, 64)))

    def smaller(self) -> Iterator[Inputs]:
        """Yield the same at small sizes, the smallest first: numbers in a forward reach further."""
        yield from self._changed(shrunk(8), shrunk(4), shrunk(2))

    def unlike(self, other: Inputs) -> Iterator[tuple[tuple[int, int], tuple[Inputs, ...]]]:
        """Yield where another has the same sizes, batch aside, and the same with other sizes there.

        Each place is an input and its dimension; dimensions of one size change together, too.
        """
        for at, shape in enumerate(self.shapes):
            for dim in range(1, len(shape)):
                if other.shapes[at][dim] != shape[dim]:
                    continue
                alike = [(at, d) for d in range(1, len(shape)) if shape[d] == shape[dim]]
                ways = ([(at, dim)], alike) if len(alike) > 1 else ([(at, dim)],)
                changed = [self.with_size(w, size) for w in ways for size in near(shape[dim])]
                yield (at, dim), tuple(changed)

    def shared(self) -> Iterator[tuple[list[tuple[int, int]], tuple[int, ...]]]:
        """Yield places with a size that several inputs share, batch aside, and others for it."""
        every = [(at, dim) for at, s in enumerate(self.shapes) for dim in range(1, len(s))]
        for size in dict.fromkeys(self.shapes[at][dim] for at, dim in every):
            places = [(at, dim) for at, dim in every if self.shapes[at][dim] == size]
            if len({at for at, _ in places}) > 1 and not self.fixed:
                more = (2 * size + 3, size + 3)
                yield places, more if size <= 32 else more[::-1]

    def with_size(self, places: Sequence[tuple[int, int]], size: int) -> Inputs:
        """Return the same with another size at some (input, dimension)."""
        shapes = [list(shape) for shape in self.shapes]
        for at, dim in places:
            shapes[at][dim] = size
        return replace(self, shapes=tuple(map(tuple, shapes)))

    def _changed(
        self, *changes: Change, of_pairs: Change | None = None, kinds: Collection[str] = ()
    ) -> Iterator[Inputs]:
        """Yield the same with changed shapes; with pairs (N, L) of some kinds changed by one."""
        pairs = [len(s) == 2 and k in kinds for s, k in zip(self.shapes, self.kinds, strict=True)]
        if of_pairs is not None and not any(pairs):
            return
        found = {self.shapes}
        for change in () if self.fixed else changes:
            shapes = tuple(
                of_pairs(shape) if pair and of_pairs is not None else change(shape)
                for shape, pair in zip(self.shapes, pairs, strict=True)
            )
            if shapes not in found:
                found.add(shapes)
                yield replace(self, shapes=shapes)


def suited(model: nn.Module, *choices: Inputs) -> Inputs | None:
    """Return the first inputs that a model answers with finite numbers, else the first it takes.

    Indices that come as floats, or logarithms, want numbers like those that were shown.
    """
    taken = None
    for one in (one for choice in choices for one in (choice, *choice.as_shown())):
        answer = _answer(model, one)
        if answer == "finite":
            return one
        taken = taken or (one if answer == "taken" else None)
    return taken


def takes(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model accepts inputs like these."""
    return refusal(model, inputs) is None


def refusal(model: nn.Module, inputs: Inputs) -> str | None:
    """Return why a model refuses inputs like these, None if it takes them."""
    error = refused(model, inputs)
    return None if error is None else first_line(error).rstrip(".")


def refused(model: nn.Module, inputs: Inputs) -> Exception | None:
    """Return what a model raises for inputs like these, None if it takes them."""
    try:
        _tried(model, inputs)
    except Exception as error:  # noqa: BLE001 - any refusal is an answer
        return error
    return None


def _answer(model: nn.Module, inputs: Inputs) -> str:
    try:
        leaves = pytree.tree_leaves(_tried(model, inputs))
    except Exception:  # noqa: BLE001 - any refusal is an answer
        return "refused"
    numbers = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    return "finite" if all(bool(torch.isfinite(x).any()) for x in numbers) else "taken"


def _tried(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model that may refuse its inputs: a GraphModule would print where it stopped."""
    with contextlib.redirect_stderr(io.StringIO()):
        return run_undisturbed(model, inputs.draw(model, 0))


def _span(x: Tensor) -> tuple[float, float, bool]:
    if not x.is_floating_point():
        return 0.0, 0.0, True
    shown = x.detach()[torch.isfinite(x)].double()
    if not shown.numel():
        return 0.0, 0.0, False
    return float(shown.min()), float(shown.max()), bool((shown == shown.round()).all())


def _kind(x: Tensor) -> str:
    return FLOAT if x.is_floating_point() else str(x.dtype).removeprefix("torch.")
