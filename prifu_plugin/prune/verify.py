"""Check that a pruned model computes what the filtered one computes, and find where if not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from prifu_plugin.device import like_of, seeded
from prifu_plugin.graph.capture import Captured
from prifu_plugin.graph.undisturbed import run_undisturbed, undisturbed
from prifu_plugin.names import is_of_filter
from prifu_plugin.prune.inputs import Inputs
from prifu_plugin.prune.layout import restrict
from prifu_plugin.prune.plan import Plan
from prifu_plugin.prune.precise import LowestPrecision, raised
from prifu_plugin.prune.quiet import Quiet

TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5}


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        dtype: "float64" or "float32".
        shapes: shapes of the inputs.
        difference: max of abs(pruned - filtered), in units of the max of abs(filtered), over all
            outputs; values of more than 1000 times the median are compared with themselves alone.
        tolerance: what it must not exceed: 1e-11 in fp64, 1e-5 in fp32, or four times the
            filtered model's own rounding error where that is more, at most 1e-3.
        rounding: difference of the filtered model from itself in fp64, measured where
            `difference` is above 1e-5; else 0. NaN if it does not run there.
    """

    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    difference: float
    tolerance: float
    rounding: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance


def compare(
    filtered: nn.Module,
    pruned: nn.Module,
    inputs: Inputs,
    seed: int,
    precise: Callable[[], nn.Module] | None = None,
    expected: Any = None,
) -> Check:
    """Compare two models on fresh inputs, in the dtype of their parameters.

    Noise of a cut filter is switched off on both sides, since it is drawn for other shapes.

    Args:
        filtered: the reference.
        pruned: what must equal it.
        inputs: what to draw.
        seed: of the inputs.
        precise: gives the filtered model in fp64, to measure what a lower precision rounds.
        expected: what the reference gives, if it has run already.
    """
    dtype = _precision(filtered)
    drawn = inputs.draw(filtered, seed)
    rounding = 0.0
    throughout = raised() if dtype == torch.float64 else nullcontext()
    with Quiet(filtered), Quiet(pruned), throughout:
        expected = _run(filtered, drawn, seed) if expected is None else expected
        found = _run(pruned, drawn, seed)
    gap = difference(expected, found)
    if dtype != torch.float64 and not _are_of_one_type(expected, found):
        gap = float("inf")
    if precise is not None and gap > _tolerance(dtype, 0.0):
        rounding = _rounding(precise(), drawn, seed, expected)
    if dtype == torch.float64 and gap > TOLERANCES[dtype] and _casts_inside(filtered, drawn):
        dtype = torch.float32  # that is as exact as it gets
    return Check(
        str(dtype).removeprefix("torch."), inputs.shapes, gap, _tolerance(dtype, rounding), rounding
    )


def _rounding(precise: nn.Module, inputs: list[Tensor], seed: int, expected: Any) -> float:
    """Return how far a model's outputs are from its own in fp64; NaN if it does not run there."""
    longer = [x.double() if x.is_floating_point() else x for x in inputs]
    try:
        with Quiet(precise), raised():
            return difference(_run(precise, longer, seed), expected)
    except Exception:  # noqa: BLE001 - a cast meets weights in fp64
        return float("nan")


def _precision(model: nn.Module) -> torch.dtype:
    """Return the type of a model's parameters; of one that is only partly in fp64, the lesser."""
    dtype = like_of(model).dtype
    if dtype != torch.float64:
        return dtype
    types = {p.dtype for name, p in model.named_parameters() if not is_of_filter(name)}
    lesser = [one for one in types if one.is_floating_point and one != torch.float64]
    return min(lesser, key=lambda one: one.itemsize, default=dtype)


def reference(captured: Captured, inputs: Inputs, seed: int) -> tuple[nn.Module, Any]:
    """Return the model in fp64 as Python runs it, with what it gives; its graph if Python casts.

    Raises:
        Exception: what the graph raises for inputs that it refuses.
    """
    lowest, drawn = LowestPrecision(), inputs.draw(captured.root, seed)
    with Quiet(captured.root), raised():
        try:
            with lowest:
                given = _run(captured.root, drawn, seed)
            if not lowest.lower:
                return captured.root, given
        except Exception:  # noqa: BLE001 - a cast meets weights in fp64, or the inputs are refused
            pass
        graph = fx.GraphModule(captured.root, captured.graph)
        return graph, _run(graph, drawn, seed)


def _run(model: nn.Module, inputs: list[Tensor], seed: int) -> Any:
    """Run a model so that whatever it draws at random is the same each time."""
    with seeded(seed):
        return run_undisturbed(model, inputs)


def _casts_inside(model: nn.Module, inputs: list[Tensor]) -> bool:
    lowest = LowestPrecision()
    with lowest, Quiet(model), raised():
        run_undisturbed(model, inputs)
    return lowest.lower


def _tolerance(dtype: torch.dtype, rounding: float) -> float:
    """Allow four times the model's own rounding, up to a bound: beyond it nothing is shown."""
    least, most = TOLERANCES.get(dtype, 1e-5), 1e-3 if dtype == torch.float32 else 0.1
    fixed = dtype == torch.float64 or rounding != rounding
    return least if fixed else max(least, min(4 * rounding, most))


def difference(expected: Any, found: Any) -> float:
    """Return the largest relative difference between two outputs of the same structure.

    Example:
        >>> difference(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 3.0]))
        0.25
    """
    left, right = _leaves(expected), _leaves(found)
    if len(left) != len(right):
        return float("inf")
    gaps = [_gap(a, b) for a, b in zip(left, right, strict=True)]
    return float("nan") if any(gap != gap for gap in gaps) else max(gaps, default=0.0)


def _are_of_one_type(expected: Any, found: Any) -> bool:
    """Whether tensors have the same types; in fp64, where all is raised, they need not."""
    pairs = zip(_leaves(expected), _leaves(found), strict=False)
    both = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(a.dtype == b.dtype for a, b in both)


def _leaves(value: Any) -> list[Any]:
    """Return the tensors and values in a structure, the fields of dataclasses too."""
    leaves = []
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            leaves += _leaves([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        else:
            leaves.append(leaf)
    return leaves


def _gap(a: Any, b: Any) -> float:
    """Return the relative difference of two leaves: inf for another kind, nan for no evidence."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if type(a) is type(b) and a == b else float("inf")
    if a.shape != b.shape or a.is_complex() != b.is_complex():
        return float("inf")
    a, b = _real(a), _real(b)
    finite = torch.isfinite(a)
    if a.numel() and not finite.any():
        return float("nan")
    odd = ~finite
    if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(
        torch.nan_to_num(a[odd]), torch.nan_to_num(b[odd])
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    return float(((a - b).abs() / _scale(a, finite))[finite].max())


def _real(x: Tensor) -> Tensor:
    """Return the values of a tensor in fp64; those of a complex one as pairs."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).detach().double()


def _scale(a: Tensor, finite: Tensor) -> Tensor:
    """Return what an error is compared with: the largest value, huge ones only for themselves.

    A logit filled with -1e30 must not hide errors in the others.
    """
    sizes = a.abs()
    shown = sizes[finite & (sizes > 0)]
    tiny = torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64)
    if not shown.numel():
        return tiny
    common = torch.minimum(shown.max(), OUTLIER * shown.median())
    return torch.maximum(torch.maximum(sizes, common), tiny)


def is_rounded(pruned: fx.GraphModule, twin: fx.GraphModule) -> bool:
    """Whether a pruned model is its twin in fp64 but for rounding: one program, the same weights.

    Each tensor may differ as outputs may, by 1e-5 of its largest value in fp32.
    """
    if str(pruned) != str(twin):
        return False
    ours, theirs = (
        {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for model in (pruned, twin)
    )
    allowed = TOLERANCES.get(_precision(pruned), 1e-5)
    return ours.keys() == theirs.keys() and all(
        difference(tensor.double(), ours[name].double()) <= allowed
        for name, tensor in theirs.items()
    )


OUTLIER = 1000.0
"""Values this many times the median are no scale for the others."""


def culprit(
    captured: Captured,
    plan: Plan,
    pruned: fx.GraphModule,
    inputs: Inputs,
    masks: dict[fx.Node, Tensor],
) -> str:
    """Return the first node whose value differs, with its difference; "" if none does.

    Both graphs run in fp64; each node of the pruned one must be the original restricted to its
    layout, on the channels that are live and needed, by the masks.
    """
    drawn = inputs.draw(captured.root, 0)
    old = _values(captured.root, captured.graph, drawn)
    new = _values(pruned, pruned.graph, drawn)
    layouts = {node.name: dict(node.layout) for node in plan.nodes}
    for node in captured.graph.nodes:
        value, found = old.get(node.name), new.get(node.name)
        needed = masks.get(node)
        sliced = node.op == "get_attr"  # a parameter may be sliced for its only reader
        if (
            not isinstance(value, Tensor)
            or not isinstance(found, Tensor)
            or needed is None
            or sliced
        ):
            continue
        expected = restrict(value, layouts[node.name])
        mask = restrict(needed, layouts[node.name]).expand(expected.shape)
        if expected.shape != found.shape:
            return f"'{node.name}': shape {tuple(found.shape)} for {tuple(expected.shape)}"
        gap = difference(expected * mask, found * mask)
        if not gap <= TOLERANCES[torch.float64]:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            inside = f" inside '{stack[-1][0]}'" if stack and stack[-1][0] else ""
            what = getattr(node.target, "__name__", node.target)
            return f"'{node.name}' ({node.op} {what}{inside}): {gap:.1e}"
    return ""


def _values(root: nn.Module, graph: fx.Graph, inputs: list[Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            kept = result.clone() if isinstance(result, Tensor) else result
            found[n.meta.get("original", n.name)] = kept
            return result

    with undisturbed(root), torch.no_grad(), Quiet(root), raised(), suppress(Exception):
        Recorder(root, graph=graph).run(*inputs)  # up to where it fails, if it does
    return found
