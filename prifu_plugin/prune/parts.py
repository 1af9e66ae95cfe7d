"""Prune the largest parts of a model whose forward cannot be followed, inside its own Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.errors import CaptureError, PrifuError, VerificationError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.host import is_host
from prifu_plugin.graph.undisturbed import run_undisturbed
from prifu_plugin.prune.hooks import LOST, has_hooks
from prifu_plugin.prune.inputs import Inputs, refusal, takes
from prifu_plugin.prune.kernels import pure_copy
from prifu_plugin.prune.one import Pruned, prune_graph, runs_of
from prifu_plugin.prune.precise import in_fp64
from prifu_plugin.prune.report import Fate
from prifu_plugin.prune.verify import Check, compare

Notes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Parts:
    """A model that was pruned in parts.

    Attributes:
        model: a copy of the original class, with pruned parts and without filters.
        said: checks, fates and notes for the report.
    """

    model: nn.Module
    said: tuple[tuple[Check, ...], tuple[Fate, ...], Notes]


def prune_parts(
    filtered: nn.Module,
    inputs: Inputs,
    why: CaptureError,
    *,
    round_to: int,
    move_cost: float,
    verify: bool,
    seed: int,
) -> Parts:
    """Replace the largest submodules that can be captured by pruned ones, from the top down.

    Args:
        filtered: on the CPU, in eval mode.
        inputs: what it takes.
        why: the reason why it cannot be pruned as a whole.
        round_to: widths become multiples of it.
        move_cost: multiply-accumulates that moving one value is taken to cost.
        verify: compare with the filtered model.
        seed: of the inputs it is compared on.

    Raises:
        CaptureError: the given one, if no part can be pruned.
        VerificationError: if the result differs.
    """
    settings = {"round_to": round_to, "move_cost": move_cost, "verify": verify, "seed": seed}
    work = _Work(filtered, inputs, settings)
    for path, _ in filtered.named_children():
        work.replace(path)
    if not work.found:
        raise why
    work.notes.insert(0, ("the whole", f"pruned in parts: {why}"))
    work.notes += [(path, LOST) for path, m in filtered.named_modules() if path and has_hooks(m)]
    checks = _certify(filtered, work.result, work.exact, inputs, seed) if verify else ()
    checks += tuple(check for _, one in work.found for check in one.checks)
    layers = tuple(_renamed(path, fate) for path, one in work.found for fate in one.layers)
    notes = [(f"{path}.{node}", text) for path, one in work.found for node, text in one.plan.notes]
    return Parts(work.result, (checks, layers, (*work.notes, *notes)))


class _Work:
    """The copies that parts are put into, their filters built in, and what has been found."""

    def __init__(self, filtered: nn.Module, inputs: Inputs, settings: dict[str, Any]) -> None:
        self.filtered = filtered
        self.inputs = inputs
        self.settings = settings
        self.calls = _calls(filtered, inputs)
        self.result = pure_copy(filtered).eval()
        self.exact = pure_copy(in_fp64(filtered)).eval()
        self.found: list[tuple[str, Pruned]] = []
        self.notes: list[tuple[str, str]] = []

    def replace(self, path: str) -> None:
        """Replace a part if it can be, else look at its own parts."""
        part = self.filtered.get_submodule(path)
        if is_host(part) or not any(isinstance(module, PriFU) for module in part.modules()):
            return
        try:
            if path not in self.calls:
                raise CaptureError("it is not called with tensors alone")
            runs = runs_of(part, self.calls[path])
            one = prune_graph(part, runs, {}, **self.settings)
            self._put(path, part, one)
        except PrifuError as error:
            self.notes.append((path, f"not pruned as one: {str(error)[:160]}"))
            for name, _ in part.named_children():
                self.replace(f"{path}.{name}")
        else:
            self.found.append((path, one))

    def _put(self, path: str, part: nn.Module, one: Pruned) -> None:
        """Put a part in; out again if the rest of the model asks for something it has not."""
        before = [(model, model.get_submodule(path)) for model in (self.result, self.exact)]
        for (model, _), twin in zip(before, (one.model, one.exact), strict=True):
            _keep_attributes(part, twin)
            model.set_submodule(path, twin)
        refused = refusal(self.result, self.inputs)
        if refused is not None:
            for model, old in before:
                model.set_submodule(path, old)
            raise CaptureError(f"the model around it looks inside: {refused}")


def _keep_attributes(part: nn.Module, twin: fx.GraphModule) -> None:
    """Give a graph what others ask its original for, and what copies of it keep."""
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    kept = {
        name: value
        for name, value in vars(part).items()
        if not name.startswith("_") and isinstance(value, plain) and not hasattr(twin, name)
    }
    twin.meta["_user_preserved_attributes"] = kept  # torch's name for it
    for name, value in kept.items():
        setattr(twin, name, value)


def _calls(model: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """Return what each submodule is called with first, for those that take tensors alone."""
    found: dict[str, Inputs | None] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            usable = bool(args) and not kwargs and all(_is_input(value) for value in args)
            if path in found and (not usable or found[path] is None):
                found[path] = None  # called in several ways
            found.setdefault(path, Inputs.of(args) if usable else None)

        return hook

    handles = [
        module.register_forward_pre_hook(note(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path and not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        run_undisturbed(model, inputs.draw(model, 0))
    finally:
        for handle in handles:
            handle.remove()
    return {path: taken for path, taken in found.items() if taken is not None}


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.numel() > 0


def _certify(
    filtered: nn.Module, result: nn.Module, exact: nn.Module, inputs: Inputs, seed: int
) -> tuple[Check, ...]:
    """Compare the whole in fp64, then in the model's own precision."""
    precise = in_fp64(filtered)
    other = inputs.batch(3) if takes(filtered, inputs.batch(3)) else inputs
    checks = (
        compare(precise, exact, inputs, seed),
        compare(precise, exact, other, seed + 1),
        compare(filtered, result, other, seed + 2, precise),
    )
    for check in checks:
        if not check.holds:
            raise VerificationError(
                f"The {type(filtered).__name__}, pruned in parts, differs from the filtered one by "
                f"{check.difference:.1e} ({check.dtype}, inputs {list(check.shapes)}; allowed "
                f"{check.tolerance:.0e}). Nothing was changed; please report it."
            )
    return checks


def _renamed(path: str, fate: Fate) -> Fate:
    return Fate(**{**vars(fate), "path": f"{path}.{fate.path}"})
