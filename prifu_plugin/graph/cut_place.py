"""Where an upload is cut, and which of its dimensions are the channels, by running the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from prifu_plugin.arguments import tensors
from prifu_plugin.device import seeded
from prifu_plugin.errors import ConfigError, first_line
from prifu_plugin.graph.norms import norm_spec, num_channels
from prifu_plugin.graph.sites import no_match
from prifu_plugin.graph.state import input_shapes
from prifu_plugin.graph.undisturbed import undisturbed


def probe_cut(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | None,
    cut: str | None,
    cut_dim: int | None = None,
) -> tuple[int, int] | None:
    """Run the model once, unchanged; return channel dimension and channels of the cut."""
    if cut_dim is not None and (isinstance(cut_dim, bool) or not isinstance(cut_dim, int)):
        raise ConfigError(f"cut_dim={cut_dim!r} is no dimension: pass an integer.")
    inputs = _examples(model, example_inputs)
    if cut is None:
        _run_once(model, inputs)
        return None
    place = _place_of(model, cut)
    seen: list[Any] = []
    made_by: list[Made] = []
    handles = [
        module.register_forward_hook(_noting(made_by, seen))
        for module in model.modules()
        if _layer_channels(module, 4) is not None
    ]
    handles.append(place.register_forward_hook(lambda m, i, o: seen.append(o)))
    try:
        _run_once(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not seen or not isinstance(seen[0], Tensor) or seen[0].ndim < 2:
        raise ConfigError(
            f"cut='{cut}' ({type(place).__name__}) does not return one tensor (N, C, ...). "
            "Cut at a module that does."
        )
    if len(seen) > 1:
        raise ConfigError(
            f"cut='{cut}' ({type(place).__name__}) is called {len(seen)} times in one forward: one "
            "filter cannot stand for several tensors. Cut at a module around it, or give the place "
            "a module of its own, such as nn.Identity."
        )
    uploaded = seen[0]
    if cut_dim is not None and not -uploaded.ndim < cut_dim < uploaded.ndim or cut_dim == 0:
        raise ConfigError(
            f"cut_dim={cut_dim} is no channel dimension of {tuple(uploaded.shape)}, the output of "
            f"'{cut}'. Pass 1 for (N, C, ...) or -1 for (N, ..., C)."
        )
    if cut_dim is None:
        found = channel_dim(uploaded, made_by) or _dim_that_follows(model, place, inputs, made_by)
        cut_dim = found or _unclear_dim(model, cut, uploaded)
    dim = cut_dim % uploaded.ndim
    return dim, uploaded.shape[dim]


def _examples(model: nn.Module, given: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """Return the inputs given, or zeros of the shapes that are known."""
    if given is not None:
        return tensors("example_inputs", given)
    shapes = input_shapes(model)
    if shapes is None:
        raise ConfigError(
            "cut needs example_inputs: pass a batch, such as torch.zeros(2, 3, 224, 224)."
        )
    reference = next(model.parameters())
    return tuple(torch.zeros((2, *shape[1:])).to(reference) for shape in shapes)


def _place_of(model: nn.Module, cut: str) -> nn.Module:
    known = dict(model.named_modules())
    del known[""]
    if cut not in known:
        places = [path for path, part in known.items() if norm_spec(part) is None]
        raise no_match(cut, places, "prifu_plugin.cut_points(model) lists where a model can be cut")
    if norm_spec(known[cut]) is not None:
        raise ConfigError(
            f"cut='{cut}' is a normalization layer, which gets a filter of its own. Cut at the "
            "module around it, or at the activation behind it."
        )
    place: nn.Module = known[cut]
    return place


def _run_once(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            model(*inputs)
    except Exception as error:
        shapes = [tuple(x.shape) for x in inputs]
        raise ConfigError(
            f"{type(model).__name__} refuses example_inputs of shape {shapes}: "
            f"{first_line(error)}. Pass a batch as the model "
            "takes it, (N, C, H, W)."
        ) from None


@dataclass(frozen=True)
class Made:
    """A layer that ran before the cut, with the dimension and number of its channels.

    Attributes:
        layer: the module.
        dim: from the front.
        channels: how many.
        rank: dimensions of what it returned.
    """

    layer: nn.Module
    dim: int
    channels: int
    rank: int


def _noting(made_by: list[Made], seen: list[Any]) -> Any:
    def note(layer: nn.Module, _: Any, out: Any) -> None:
        made = _layer_channels(layer, out.ndim) if isinstance(out, Tensor) else None
        if made is not None and not seen:
            made_by.append(Made(layer, made[0] % out.ndim, made[1], out.ndim))

    return note


def channel_dim(uploaded: Tensor, made_by: Sequence[Made]) -> int | None:
    """Return the channel dimension of an uploaded tensor, None if its shape does not tell.

    It is the one with the width of the layer before, the last one with channels that ran.

    Args:
        uploaded: the tensor, (N, ...).
        made_by: the layers that ran up to the cut.
    """
    if uploaded.ndim == 2:
        return 1
    width = made_by[-1].channels if made_by else uploaded.shape[1]
    places = [d for d in range(1, uploaded.ndim) if uploaded.shape[d] == width]
    return places[0] if len(places) == 1 or (places and not made_by) else None


def _dim_that_follows(
    model: nn.Module, place: nn.Module, inputs: tuple[Tensor, ...], made_by: Sequence[Made]
) -> int | None:
    """Return the dimension along which one entry alone moves with one channel of a layer before.

    It is the last layer that moves anything: a branch may start at 0. Where channels are mixed
    since, an upload of the same rank has them where that layer has them.
    """
    wide = [made for made in made_by if made.channels == made_by[-1].channels]
    for made in wide[::-1][:TRIED]:
        changed, shape = _moved(model, place, inputs, made)
        if len(changed):
            several = (d for d in range(1, len(shape)) if shape[d] > 1)
            found = [d for d in several if len(changed[:, d].unique()) == 1]
            if len(found) != 1:
                return made.dim if len(shape) == made.rank else None
            return found[0]
    return None


TRIED = 8
"""Layers before a cut that are moved, at most."""


def _moved(
    model: nn.Module, place: nn.Module, inputs: tuple[Tensor, ...], made: Made
) -> tuple[Tensor, torch.Size]:
    """Return where an upload changes with one channel of a layer, (n, rank), and its shape."""
    seen: list[Tensor] = []

    def move(_: Any, __: Any, out: Tensor) -> Tensor:
        if not seen:  # the first run is as it was
            return out
        out = out.clone()
        moved = out.select(made.dim, made.channels // 2)
        wave = torch.arange(1, moved.numel() + 1).sin().view_as(moved).to(moved)
        moved += (1 + moved.abs().max()) * wave
        return out

    handles = [made.layer.register_forward_hook(move)]
    handles.append(place.register_forward_hook(lambda m, i, o: seen.append(o)))
    try:
        for _ in range(2):
            with seeded(0, inputs[0].device):  # of noise that a forward draws
                _run_once(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return (seen[0] != seen[1]).nonzero(), seen[0].shape


def _unclear_dim(model: nn.Module, cut: str, uploaded: Tensor) -> NoReturn:
    raise ConfigError(
        f"cut='{cut}' of {type(model).__name__} returns {tuple(uploaded.shape)}, and which of these"
        " are the channels is not clear. Pass cut_dim=, 1 for (N, C, ...) or -1 for (N, ..., C)."
    )


def _layer_channels(layer: nn.Module, ndim: int) -> tuple[int, int] | None:
    """Return channel dimension and width of what a layer puts out, None for other modules."""
    spec = norm_spec(layer)
    if spec is not None:
        width = num_channels(layer)
        return None if width is None else (spec.dim_at(ndim), width)
    if isinstance(layer, nn.Linear):
        return -1, layer.out_features
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return -1, layer.embedding_dim
    if isinstance(layer, nn.modules.conv._ConvNd):
        return 1, layer.out_channels
    return None
