"""Inputs for the runs of prune: what the user showed, at other batch sizes and other sizes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
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
        as long. Sequences grow. A model that takes none has its size fixed.
        """
        odd = (_odd((5, -5)), _odd((1, 1)), _odd((1, 0)), _odd((0, 1)))
        changes = (*odd, _skewed, _grown, _framed, _by_patches, _longer, _far_signals, _doubled)
        yield from self._changed(_far, *changes)

    def elsewhere(self) -> Iterator[Inputs]:
        """Yield the same at sizes that are not among the first of `sized`."""
        yield from self._changed(_between, _between_signals, _odd((33, -1)), _odd((64, 64)))

    def _changed(self, *changes: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Iterator[Inputs]:
        found = {self.shapes}
        for change in changes:
            shapes = tuple(change(shape) for shape in self.shapes)
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
    try:
        _tried(model, inputs)
    except Exception as error:  # noqa: BLE001 - any refusal is an answer
        return first_line(error).rstrip(".")
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


def _odd(more: tuple[int, int]) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Return how images are skewed, with so much more in height and width."""

    def change(shape: tuple[int, ...]) -> tuple[int, ...]:
        skewed = _skewed(shape)
        if len(shape) != 4:
            return skewed if len(shape) < 4 else (*shape[:2], *(size + 1 for size in skewed[2:]))
        return *skewed[:2], skewed[2] + more[0], skewed[3] + more[1]

    return change


def _far(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make sequences (N, L, C) more than twice as long: every fourth of them is one more, too."""
    return (shape[0], 2 * shape[1] + 3, shape[2]) if len(shape) == 3 else shape


def _far_signals(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Do the same to signals (N, C, L)."""
    return (*shape[:2], 2 * shape[2] + 3) if len(shape) == 3 else shape


def _between_signals(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], shape[2] + 7) if len(shape) == 3 else shape


def _between(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make images and sequences somewhat larger, by what is no multiple of much."""
    if len(shape) == 3:
        return shape[0], shape[1] + 7, shape[2]
    return (*shape[:2], shape[2] + 21, shape[3] + 11) if len(shape) == 4 else shape


def _skewed(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 4:
        return _grown(shape)
    n, c, height, width = shape
    return n, c, height + 32, width - 32 if width > 63 else width + 64


def _grown(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make whatever may be a length longer: all but batch and channels, or tokens (N, L, C)."""
    if len(shape) == 2:
        return shape
    if len(shape) == 3:
        return shape[0], shape[1] + 3, shape[2]
    return *shape[:2], *(size + 32 for size in shape[2:])


def _framed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Make the images of clips (N, frames, C, H, W) larger, whose third size is no length."""
    if len(shape) != 5:
        return shape
    return *shape[:3], *(size + 32 for size in shape[3:])


def _by_patches(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 4:
        return shape
    return *shape[:2], shape[2] + 28, shape[3] + 56


def _longer(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 2 * shape[-1]) if len(shape) == 4 else shape


def _doubled(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 3:
        return *shape[:2], 2 * shape[2]
    return *shape[:2], *(2 * size for size in shape[2:])
