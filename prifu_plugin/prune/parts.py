"""Prune the largest parts of a model whose forward cannot be followed, inside its own Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prifu_plugin.errors import CaptureError, PrifuError, VerificationError
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.host import is_host
from prifu_plugin.graph.undisturbed import run_undisturbed
from prifu_plugin.prune.attributes import keep_attributes
from prifu_plugin.prune.hooks import LOST, has_hooks
from prifu_plugin.prune.inputs import Inputs, refusal, takes
from prifu_plugin.prune.kernels import pure_copy
from prifu_plugin.prune.one_graph import Pruned, prune_graph, runs_of
from prifu_plugin.prune.plan import Notes
from prifu_plugin.prune.precise import in_fp64
from prifu_plugin.prune.report import Fate
from prifu_plugin.prune.settings import PruneSettings
from prifu_plugin.prune.verify import Check, compare


def prune_parts(
    filtered: nn.Module,
    inputs: Inputs,
    why: CaptureError,
    settings: PruneSettings,
) -> Pruned:
    """Replace the largest submodules that can be captured by pruned ones, from the top down.

    The result is a copy of the original class, with pruned parts and without filters.

    Args:
        filtered: on the CPU, in eval mode.
        inputs: what it takes.
        why: the reason why it cannot be pruned as a whole.
        settings: what was asked for.

    Raises:
        CaptureError: the given one, if no part can be pruned.
        VerificationError: if the result differs.
    """
    tried = _tried(filtered, inputs)
    work = _Work(filtered, tried, settings).replaced()
    if not work.found:
        raise why
    checks: tuple[Check, ...] = ()
    unsure: Notes = ()
    if settings.verify:
        try:
            checks, unsure = _certify(filtered, work.result, work.exact, tried, settings.seed)
        except VerificationError:  # the Python around a part may ask what the part is
            work = _Work(filtered, tried, settings, compares=True).replaced()
            if not work.found:
                raise
            checks, unsure = _certify(filtered, work.result, work.exact, tried, settings.seed)
    work.notes[:0] = [("the whole", f"pruned in parts: {why}"), *unsure]
    work.notes += [(path, LOST) for path, m in filtered.named_modules() if path and has_hooks(m)]
    checks += tuple(check for _, one in work.found for check in one.checks)
    layers = tuple(_renamed(path, fate) for path, one in work.found for fate in one.layers)
    notes = [(f"{path}.{node}", text) for path, one in work.found for node, text in one.notes]
    return Pruned(work.result, work.exact, None, checks, layers, (*work.notes, *notes), "parts")


class _Work:
    """The copies that parts are put into, their filters built in, and what has been found.

    Args:
        filtered: what is to be pruned.
        tried: inputs that it takes, first those that were shown.
        settings: what was asked for.
        compares: whether to compare the whole, in fp64, after each part.
    """

    def __init__(
        self,
        filtered: nn.Module,
        tried: tuple[Inputs, ...],
        settings: PruneSettings,
        *,
        compares: bool = False,
    ) -> None:
        self.filtered = filtered
        self.tried = tried
        self.settings = settings
        self.precise = in_fp64(filtered) if compares else None
        self.calls = _calls(filtered, tried[0])
        self.result = pure_copy(filtered).eval()
        self.exact = pure_copy(in_fp64(filtered)).eval()
        self.found: list[tuple[str, Pruned]] = []
        self.notes: list[tuple[str, str]] = []

    def replaced(self) -> _Work:
        """Replace what can be replaced, from the top down."""
        for path, _ in self.filtered.named_children():
            self.replace(path)
        return self

    def replace(self, path: str) -> None:
        """Replace a part if it can be, else look at its own parts."""
        part = self.filtered.get_submodule(path)
        if is_host(part) or not any(isinstance(module, PriFU) for module in part.modules()):
            return
        try:
            if path not in self.calls:
                raise CaptureError("it is not called with tensors alone")
            runs = runs_of(part, self.calls[path])
            one = prune_graph(part, runs, {}, self.settings)
            self._put(path, part, one)
        except PrifuError as error:
            self.notes.append((path, f"not pruned as one: {error}"))
            for name, _ in part.named_children():
                self.replace(f"{path}.{name}")
        else:
            self.found.append((path, one))

    def _put(self, path: str, part: nn.Module, one: Pruned) -> None:
        """Put a part in; out again if the rest of the model asks for something it has not."""
        before = [(model, model.get_submodule(path)) for model in (self.result, self.exact)]
        for (model, _), twin in zip(before, (one.model, one.exact), strict=True):
            keep_attributes(part, twin)
            model.set_submodule(path, twin)
        refused = self._refused()
        if refused is not None:
            for model, old in before:
                model.set_submodule(path, old)
            raise CaptureError(f"the model around it looks inside: {refused}")

    def _refused(self) -> str | None:
        """Return why the model does not run, or is another one, with what was put in last."""
        for inputs in self.tried:
            refused = refusal(self.result, inputs)
            if refused is not None:
                return refused
            if self.precise is not None:
                check = compare(self.precise, self.exact, inputs, self.settings.seed)
                if not check.holds:
                    return f"its outputs change by {check.difference:.1e}"
        return None


def _tried(filtered: nn.Module, inputs: Inputs) -> tuple[Inputs, ...]:
    """Return what to run the whole with: what was shown, and up to two other sizes it takes.

    What the Python around a part does at other sizes alone shows there, or nowhere.
    """
    _, *others = runs_of(filtered, inputs)
    seen = {inputs.shapes, *(other.batch(1).shapes for other in others)}
    more = (one for one in inputs.batch(1).elsewhere() if one.shapes not in seen)
    third = next((one for one in more if takes(filtered, one)), None)
    return (inputs, *others, *([] if third is None else [third]))


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
    filtered: nn.Module,
    result: nn.Module,
    exact: nn.Module,
    inputs: tuple[Inputs, ...],
    seed: int,
) -> tuple[tuple[Check, ...], Notes]:
    """Compare the whole in fp64, then in the model's own precision, where they repeat themselves.

    A detector that sorts and drops boxes by score is not continuous: rounding alone may change
    which are left. Each part has been compared in both precisions before.
    """
    precise = in_fp64(filtered)
    tried = [compare(precise, exact, one, seed + at) for at, one in enumerate(inputs)]
    other = inputs[min(1, len(inputs) - 1)]
    for place in range(_TRIES):
        own = compare(filtered, result, other, seed + len(inputs) + place, lambda: precise)
        if own.holds:
            break
    tried.append(own)
    failed = [check for check in tried if not check.holds]
    if not failed:
        return tuple(tried), ()
    moved = max(_shaken(filtered, other, seed + place) for place in range(_TRIES))
    for check in failed:
        if check.dtype == "float64" or max(moved, check.rounding) <= check.tolerance:
            raise VerificationError(
                f"The {type(filtered).__name__}, pruned in parts, differs from the filtered one by "
                f"{check.difference:.1e} ({check.dtype}, inputs {list(check.shapes)}; allowed "
                f"{check.tolerance:.0e}). Nothing was changed. If the Python around a part reads "
                "the weights of a norm in it, leave that norm out with exclude=, or else report it."
            )
    held = [check for check in tried if check.holds]
    why = (
        f"it decides on values that rounding changes: its own outputs move by {moved:.1e} when "
        f"activations change in their last digit, those of the pruned model by "
        f"{failed[-1].difference:.1e}. Compared as a whole in "
        f"{' and '.join(sorted({check.dtype for check in held})) or 'no precision'}, and part by "
        "part in both"
    )
    return tuple(held), (("the whole", why),)


_TRIES = 3
"""Inputs on which the whole may agree in the model's own precision."""


def _shaken(model: nn.Module, inputs: Inputs, seed: int) -> float:
    """Return how far outputs move when what each layer returns changes in its last digit."""
    moved = pure_copy(model).eval()
    generator = torch.Generator().manual_seed(seed)

    def shake(_: nn.Module, __: Any, y: Any) -> Any:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        return y * (1 + torch.finfo(y.dtype).eps * torch.randn(y.shape, generator=generator).to(y))

    for module in moved.modules():
        if not list(module.children()):
            module.register_forward_hook(shake)
    return compare(model, moved, inputs, seed).difference


def _renamed(path: str, fate: Fate) -> Fate:
    return Fate(**{**vars(fate), "path": f"{path}.{fate.path}"})
