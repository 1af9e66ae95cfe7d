"""fastest: prune in several exact ways, measure each in turns, return the quickest."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prifu_plugin.arguments import whole_number
from prifu_plugin.errors import ConfigError, PrifuWarning, VerificationError
from prifu_plugin.graph.state import copied
from prifu_plugin.prune.inputs import Inputs, suited
from prifu_plugin.prune.planner import WHOLE
from prifu_plugin.prune.run import prune

Way = tuple[int, float]
Build = Callable[[nn.Module], Callable[[], Any]]

WAYS: tuple[Way, ...] = (
    *((1, 0.0), (1, 64.0), (16, 64.0), (16, 256.0), (1, float("inf"))),
    (WHOLE, 0.0),
)
"""(round_to, move_cost) to try: the smallest model, those that save copies, the aligned ones; and
that without a channel less, where few are closed and each costs a copy."""


@dataclass(frozen=True)
class Fastest:
    """What `fastest` found.

    Attributes:
        model: the quickest pruned model, verified.
        round_to: the setting it was made with.
        move_cost: the setting it was made with.
        ratios: (round_to, move_cost) -> median latency over that of the filtered model.
    """

    model: nn.Module = field(repr=False)
    round_to: int
    move_cost: float
    ratios: dict[Way, float]


def fastest(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    *,
    build: Build | None = None,
    ways: Sequence[Way] = WAYS,
    rounds: int = 15,
    seed: int = 0,
) -> Fastest:
    """Prune in several ways, all exact, and return the one that runs quickest where you run it.

    A smaller model is not always a quicker one: runtimes like aligned widths, and dropping a
    channel where that needs a copy can cost more than it saves. All candidates and the filtered
    model run in turns, so that a busy machine slows all of them.

    Args:
        model: a wrapped model; it is not changed.
        example_inputs: a batch of the size you will run, as for `prune`.
        build: gets a model and returns a function that runs it once, for instance in a session
            of ONNX Runtime. By default, PyTorch runs it on `example_inputs`.
        ways: pairs of `round_to` and `move_cost` to try.
        rounds: how often each is run, after two to warm up.
        seed: of the inputs on which the result is compared with the filtered model.

    Returns:
        The quickest, and how long each way takes relative to the filtered model.

    Raises:
        ConfigError: if there is nothing to try.
        Exception: as `prune`, and whatever `build` raises.

    Example:
        >>> import prifu_plugin as prifu
        >>> net = prifu.wrap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> found = fastest(net, torch.zeros(1, 3, 16, 16), ways=[(1, 0.0), (4, 0.0)], rounds=3)
        >>> sorted(found.ratios)
        [(1, 0.0), (4, 0.0)]
    """
    ways = list(ways)
    pairs = all(isinstance(way, tuple) and len(way) == 2 for way in ways)
    if not ways or not pairs:
        raise ConfigError("ways= needs at least one pair of round_to and move_cost: [(1, 0.0)].")
    rounds = whole_number("rounds", rounds)
    inputs = Inputs.for_model(model, example_inputs)
    drawn = (suited(model, inputs) or inputs).draw(model, seed)
    device = next(model.parameters()).device
    build = build or _in_torch([x.to(device) for x in drawn])
    runs: dict[Way | None, Callable[[], Any]] = {None: build(copied(model).eval())}
    _check_built(runs[None])
    for round_to, move_cost in tqdm(ways, desc="pruning", leave=False, disable=None):
        small = prune(
            model, example_inputs, round_to=round_to, move_cost=move_cost, verify=False, seed=seed
        )
        runs[round_to, move_cost] = build(small)
        _check_built(runs[round_to, move_cost])
    ratios = _ratios(runs, rounds)
    *quick, last = sorted(ratios, key=lambda way: ratios[way])
    for round_to, move_cost in quick:
        try:
            best = prune(model, example_inputs, round_to=round_to, move_cost=move_cost, seed=seed)
        except VerificationError as error:
            warnings.warn(f"Left out, as it is not exact: {error}", PrifuWarning, stacklevel=2)
            continue
        return Fastest(best, round_to, move_cost, ratios)
    best = prune(model, example_inputs, round_to=last[0], move_cost=last[1], seed=seed)
    return Fastest(best, *last, ratios)


def _in_torch(inputs: list[Tensor]) -> Build:
    def build(model: nn.Module) -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> Any:
            result = model(*inputs)
            _wait_for(inputs[0].device)
            return result

        return run

    return build


def _check_built(run: Any) -> None:
    if not callable(run):
        raise ConfigError(
            f"build returns a {type(run).__name__}: let it return a function without arguments "
            "that runs the model once."
        )


def _wait_for(device: torch.device) -> None:
    """Wait until a device that works on its own has done what it was told."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == device.type:
        torch.accelerator.synchronize(device)


def _ratios(runs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Way, float]:
    """Run all in turns, the first one rotating, and return medians relative to the one of None."""
    names = list(runs)
    taken: dict[Any, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(rounds + 2), desc="measuring", leave=False, disable=None):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
    plain = taken.pop(None)[2:]
    return {
        name: statistics.median(t / p for t, p in zip(times[2:], plain, strict=True))
        for name, times in taken.items()
    }
