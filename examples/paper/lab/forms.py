"""Forms of the filter: how W and a norm's own scale share the work, and how both change."""

import collections
from typing import Any

import torch
from torch import Tensor, nn

import prifu_plugin as prifu
from lab.scale import Scale
from prifu_plugin import baselines
from prifu_plugin.baselines.base import Batch


def filtered(
    model: nn.Module, at: str, first: Tensor, settings: dict[str, Any], count: int, scale: Scale
) -> nn.Module:
    """Wrap a network.

    Args:
        model: to wrap, in place.
        at: the cut, for a filter on the upload.
        first: example inputs.
        settings: "form" is the paper's (no affine norm, a bias, W from 0.1) or preserved; "affine"
            is what becomes of the norms' scale in the preserved form: free, frozen, or absorbed
            (W starts as its magnitude, it as its sign, and the shift goes behind the filter);
            "over" the "positions", the filter on the upload has a weight for each value of a map
            rather than for each channel; "rotated", a learned map, at first the identity, precedes
            it, so that the rank of the upload is learned with the filter; "dose", "alpha", "init"
            and "noise" are those of `prifu_plugin.wrap`.
        count: images to train on.
        scale: what all share.
    """
    rates = scale.schedule.rates(count)
    dose = settings.get("dose", scale["filter"]["dose"])
    bare = settings.get("form", "paper") == "paper"
    if bare:  # as in the authors' code, W takes the place of the norm's own scale
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.affine, module.weight, module.bias = False, None, None
    sent = _prepared(model, at, first, settings)
    wrapped = prifu.wrap(
        model,
        alpha=settings.get("alpha", scale["filter"]["alpha"]),
        beta=prifu.dose_to_beta(dose, rates) if dose else 0.0,
        init=settings.get("init", scale["filter"]["init"]),
        bias=bare or settings.get("affine") == "absorbed",
        preserve=not bare,
        cut=sent if settings.get("cut_filter") else None,
        noise=settings.get("noise", 0.0),
        example_inputs=first,
    )
    if not bare:
        _share_scale(wrapped, settings.get("affine", "free"))
    return wrapped


def _prepared(model: nn.Module, at: str, first: Tensor, settings: dict[str, Any]) -> str:
    """Put what a form wants in front of the filter on the upload, in place; return its path."""
    if not settings.get("rotated") and settings.get("over") != "positions":
        return at
    own, seen = model.get_submodule(at), []
    handle = own.register_forward_hook(lambda _, __, z: seen.append(z.shape[1:]))
    with torch.no_grad():
        model.eval()(first)
    handle.remove()
    channels, *space = seen[0]
    parts: dict[str, nn.Module] = {"own": own}
    if settings.get("rotated"):
        rotation = nn.Conv2d(channels, channels, 1) if space else nn.Linear(channels, channels)
        nn.init.zeros_(rotation.bias)
        with torch.no_grad():
            rotation.weight.copy_(torch.eye(channels).reshape(rotation.weight.shape))
        parts["rotation"] = rotation.to(first.device)
    if settings.get("over") == "positions":
        parts["flat"] = nn.Flatten()
    parts["sent"] = nn.Identity()
    if settings.get("over") == "positions":
        parts["back"] = nn.Unflatten(1, seen[0])
    model.set_submodule(at, nn.Sequential(collections.OrderedDict(parts)))
    return f"{at}.sent"


class Scheduled(baselines.TaskOnly):
    """Training for the task, with a filter whose settings may change on the way.

    Args:
        edge: the front.
        cloud: the rest.
        model: both, wrapped or not.
        settings: "gain_to", "alpha_from" and "ramped" noise change over the first half of
            training; "recalibrated" estimates the norms' statistics anew behind it.
        steps: of training.
    """

    def __init__(
        self,
        edge: nn.Module,
        cloud: nn.Module,
        model: nn.Module,
        settings: dict[str, Any],
        steps: int,
    ) -> None:
        super().__init__(edge, cloud)
        self._to_recalibrate = [model] if settings.get("recalibrated") else []
        courses: dict[str, Any] = {}
        units = list(prifu.filters(model).values()) if set(settings) & CHANGING else []
        if "gain_to" in settings:
            courses["gain"] = (units[0].gain, settings["gain_to"])
        if "alpha_from" in settings:
            courses["alpha"] = (settings["alpha_from"], units[0].alpha)
        if settings.get("ramped"):
            courses["noise"] = (0.0, settings["noise"])
        self._schedule = prifu.FilterSchedule(model, steps, until=0.5, **courses) if units else None

    def step(self, batch: Batch) -> dict[str, float]:
        """Train on one batch, and change what is due."""
        terms = super().step(batch)
        if self._schedule:
            self._schedule.step()
        return terms

    def finish(self, batches: list[Batch]) -> None:
        """Estimate statistics anew, if it is asked for."""
        for model in self._to_recalibrate:
            prifu.recalibrate(model, [batch.images for batch in batches])


CHANGING = {"gain_to", "alpha_from", "ramped"}


def _share_scale(wrapped: nn.Module, affine: str) -> None:
    """Freeze the norms' own scale, or move its magnitude into W; what is computed stays."""
    if affine not in ("free", "frozen", "absorbed"):
        raise ValueError(f"affine={affine!r} is none of free, frozen, absorbed.")
    if affine == "absorbed":
        prifu.absorb(wrapped)
    for module in wrapped.modules() if affine == "frozen" else ():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)
