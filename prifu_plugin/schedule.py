"""Settings of filters that change over training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from prifu_plugin.arguments import number, whole_number
from prifu_plugin.cut import CutFilter
from prifu_plugin.errors import ConfigError, FilterError
from prifu_plugin.graph.insert import filters
from prifu_plugin.graph.state import wrap_state

Course = tuple[float, float] | Callable[[float], float]
"""From one value to another, linearly; or any function of the share of training that is done."""


class FilterSchedule:
    """Change alpha, beta, gain or noise of a wrapped model over training, step by step.

    Call `step` where a learning-rate scheduler's is called. A threshold that grows lets filters
    learn before they close; a gain that falls from 1/init to 1 starts as the pretrained network
    and ends as the paper's filter; noise that grows lets a network find its task first.

    Args:
        model: a wrapped model.
        steps: optimizer steps of the whole run.
        alpha: course of the threshold of Eq. 4.
        beta: course of the decay of Eq. 6; `dose_to_beta` finds a constant one.
        dose: wanted dose of the run; scales the course of beta, a constant if none is given.
        rates: learning rates of all steps, for the dose.
        gain: course of the fixed factor on W.
        noise: course of the noise on the filtered upload.
        until: share of training in (0, 1] after which pairs have reached their second value.
        every: steps between changes; compiled models compile anew for new values.
        also: wrapped averages of the model (`ModelEmaV3.module`, `AveragedModel.module`), whose
            filters follow: weights are averaged, settings are copied.

    Raises:
        ConfigError: if nothing is scheduled, a value leaves its range anywhere on the course, or
            noise is scheduled without a filter on an upload.
        OrderError: if the model is not wrapped.

    Example:
        >>> import prifu_plugin as prifu
        >>> model = prifu.wrap(nn.Sequential(nn.BatchNorm1d(4)))
        >>> schedule = FilterSchedule(model, steps=4, alpha=(0.0, 0.2))
        >>> for _ in range(3):
        ...     schedule.step()
        >>> round(prifu.filters(model)["0"].alpha, 6)
        0.15
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        alpha: Course | None = None,
        beta: Course | None = None,
        dose: float | None = None,
        rates: Sequence[float] | None = None,
        gain: Course | None = None,
        noise: Course | None = None,
        until: float = 1.0,
        every: int = 1,
        also: Sequence[nn.Module] = (),
    ) -> None:
        for one in (model, *also):
            wrap_state(one)
        steps, every = whole_number("steps", steps), whole_number("every", every)
        until = number("until", until)
        if not 0 < until <= 1:
            raise ConfigError(f"until={until} is not a share in (0, 1].")
        if dose is not None:
            beta = _dosed(beta or (1.0, 1.0), dose, rates, (steps, every), until)
        given = {"alpha": alpha, "beta": beta, "gain": gain, "noise": noise}
        self._courses = {
            name: _course(name, course) for name, course in given.items() if course is not None
        }
        if not self._courses:
            raise ConfigError("Nothing is scheduled: pass alpha=, beta=, gain= or noise=.")
        every_module = [module for one in (model, *also) for module in one.modules()]
        self._cuts = [module for module in every_module if isinstance(module, CutFilter)]
        self._followers = [unit for one in also for unit in filters(one).values()]
        if noise is not None and not self._cuts:
            raise ConfigError("noise= is scheduled, but no upload is filtered: wrap with cut=.")
        self._units = filters(model)
        self.steps = steps
        self.until = until
        self.every = every
        self.done = 0
        for step in range(steps + 1):
            self._check(step)
        self._apply()

    def step(self) -> None:
        """Count one optimizer step, and change what is due; after the last, values stay."""
        self.done += 1
        if self.done % self.every == 0 or self.done == self.steps:
            self._apply()

    def values(self) -> dict[str, float]:
        """Return the scheduled values as of the last change."""
        last = min(self.done, self.steps)
        return self._values(last if last == self.steps else last - last % self.every)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: steps done and in all, and the dose of each filter."""
        doses = {path: unit.dose for path, unit in self._units.items()}
        return {"done": self.done, "steps": self.steps, "dose": doses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            FilterError: if it is of a model with other filters, or of a schedule of other length.
        """
        if not isinstance(state, Mapping) or not {"done", "dose"} <= set(state):
            raise FilterError("This is not the state of a schedule: pass its own state_dict().")
        if set(state["dose"]) != set(self._units):
            odd = sorted(set(state["dose"]) ^ set(self._units))
            raise FilterError(
                f"The schedule's state is of another model: '{odd[0]}' is a filter in one of them "
                f"only ({len(odd)} such). Wrap with the settings of that run."
            )
        steps = state.get("steps", self.steps)  # which states of before did not hold
        if steps != self.steps:
            raise FilterError(
                f"The schedule's state is of {steps} steps, and this one has {self.steps}: its "
                f"values would jump. Make the schedule with steps={steps}."
            )
        doses = {path: number(f"dose of {path}", dose) for path, dose in state["dose"].items()}
        self.done = whole_number("done", state["done"], least=0)
        for path, dose in doses.items():
            self._units[path].dose = dose
        self._apply()

    def _values(self, step: int) -> dict[str, float]:
        share = step / self.steps
        return {name: _at(course, share, self.until) for name, course in self._courses.items()}

    def _check(self, step: int) -> None:
        for name, value in self._values(step).items():
            low, high = (0.0, 1.0) if name == "alpha" else (0.0, math.inf)
            inside = low <= value < high and (value > 0 or name != "gain")
            if not inside:
                allowed = {"alpha": "in [0, 1)", "gain": "above 0"}.get(name, "at least 0")
                where = f"at step {step} of {self.steps}"
                raise ConfigError(f"{name}={value} {where} is not {allowed}.")

    def _apply(self) -> None:
        for name, value in self.values().items():
            units = [*self._units.values(), *self._followers]
            for owner in self._cuts if name == "noise" else units:
                setattr(owner, name, value)


def _course(name: str, course: Any) -> Course:
    if callable(course):
        function: Callable[[float], float] = course
        return function
    if not isinstance(course, tuple | list) or len(course) != 2:
        raise ConfigError(
            f"{name}={course!r}: pass a pair, {name}=(first, last), or a function of the share of "
            "training that is done."
        )
    return number(name, course[0]), number(name, course[1])


def _at(course: Course, share: float, until: float) -> float:
    if callable(course):
        value = course(share)
        try:
            return number("value", value)
        except ConfigError:
            raise ConfigError(
                f"A course returned {value!r} for the share {share:.2f} of training: let the "
                "function return a number."
            ) from None
    start, end = course
    return start + (end - start) * min(1.0, share / until)


def _dosed(
    beta: Course,
    dose: float,
    rates: Sequence[float] | None,
    course_of: tuple[int, int],
    until: float,
) -> Course:
    """Scale a course of beta, in force in steps of `every`, to the sum of rate * beta = dose."""
    steps, every = course_of
    dose, beta = number("dose", dose), _course("beta", beta)
    rates = [number("rates", rate) for rate in rates] if isinstance(rates, Iterable) else []
    if len(rates) != steps:
        raise ConfigError(
            f"dose={dose} needs rates=, the learning rate of each of the {steps} steps; "
            f"{len(rates) or 'none'} were given."
        )
    in_force = [_at(beta, (step - step % every) / steps, until) for step in range(steps)]
    total = sum(rate * value for rate, value in zip(rates, in_force, strict=True))
    if dose < 0 or total <= 0:
        raise ConfigError(f"dose={dose}: the rates times the course of beta sum to {total:g}.")
    return lambda share: dose / total * _at(beta, share, until)
