"""What a forward does beside its operations: kept, or refused in words; never lost."""

import copy
import enum
import inspect
import math
import random
import re
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError, NoSiteError
from prifu_plugin.graph import functional
from prifu_plugin.graph.capture import capture
from prifu_plugin.graph.functional import functional_calls
from prifu_plugin.graph.patches import patched
from prifu_plugin.graph.side_effects import only_operations
from prifu_plugin.prune.quiet import DrawingAlike
from prifu_plugin.prune.verify import difference


class Around(nn.Module):
    """A functional normalization, and something beside it."""

    def __init__(self, body):
        super().__init__()
        self.layer, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.rand(4))
        self.drop, self.act, self.scale = nn.Dropout(0.0), F.relu, 2.0
        self.count, self.body = 0, body
        self.kept, self.last = [], {}
        self.register_buffer("seen", torch.zeros(()))

    def normed(self, x):
        return F.layer_norm(self.layer(x), (4,), self.gamma)

    def forward(self, x):
        x = self.body(self, x)
        return F.layer_norm(self.layer(x), (4,), self.gamma) * self.scale


def changed(model, change):
    change(model)
    return model


CHANGES = {
    "a number": lambda m: setattr(m, "scale", 5.0),
    "a child's": lambda m: setattr(m.drop, "p", 1.0),
    "a function": lambda m: setattr(m, "act", F.gelu),
    "the kind of a number": lambda m: setattr(m, "scale", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_plain_attributes_of_a_functional_host_stay_alive(change):
    def body(self, x):
        return self.act(F.dropout(x, self.drop.p, self.training))

    torch.manual_seed(0)
    net, x = Around(body), torch.randn(6, 4)
    wrapped = prifu.wrap(net)
    for mode in (True, False):
        torch.testing.assert_close(wrapped.train(mode)(x), net.train(mode)(x))
    for model in (net, wrapped):
        change(model)
    for mode in (True, False):
        torch.testing.assert_close(wrapped.train(mode)(x), net.train(mode)(x))
    twin = copy.deepcopy(wrapped)
    assert torch.equal(twin(x), wrapped(x))
    pruned = prifu.prune(wrapped, x)
    torch.testing.assert_close(pruned(x), wrapped.eval()(x))


@pytest.mark.parametrize("kind", [torch.Tensor, (int, torch.Tensor), torch.Size, nn.Parameter])
def test_a_forward_that_asks_for_types_is_answered(kind):
    def body(self, x):
        return x * 3 if isinstance(x, kind) and not isinstance(x.shape[0], torch.Tensor) else x - 1

    torch.manual_seed(0)
    net, x = Around(body).eval(), torch.randn(6, 4)
    wrapped = prifu.wrap(net).eval()
    torch.testing.assert_close(wrapped(x), net(x))
    torch.testing.assert_close(prifu.prune(wrapped, x)(x), net(x))


def half_precision(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.layer(x)


def full_precision(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.layer(x)


def without_gradients(self, x):
    with torch.no_grad():
        return self.layer(x)


def in_inference_mode(self, x):
    with torch.inference_mode():
        return self.layer(x)


def asking(self, x):
    return x * 2 if torch.is_grad_enabled() else x


def layer_drop(self, x):
    return x if random.random() < 0.5 else x * 2


def layer_drop_of_torch(self, x):
    return x if torch.rand(()) < 0.5 else x * 2


def layer_drop_of_numpy(self, x):
    return x if np.random.rand() < 0.5 else x * 2


def counting(self, x):
    self.count += 1
    return x


def counting_in_a_buffer(self, x):
    self.seen.add_(1)
    return x


def counting_in_a_new_buffer(self, x):
    self.seen = self.seen + 1
    return x


def keeping_in_a_list(self, x):
    self.kept.append(1)
    return x


def keeping_in_a_dictionary(self, x):
    self.last["x"] = x
    return x


LOST = {
    half_precision: "autocast",
    full_precision: "autocast",
    without_gradients: "gradients",
    in_inference_mode: "inference mode",
    asking: "asks for gradients",
    layer_drop: "draws random numbers",
    layer_drop_of_torch: "draws random numbers",
    layer_drop_of_numpy: "draws random numbers",
    counting: "changes count",
    counting_in_a_buffer: "changes buffer seen",
    counting_in_a_new_buffer: "changes .*seen",
    keeping_in_a_list: "changes an item of kept",
    keeping_in_a_dictionary: r"changes last\['x'\]",
}


@pytest.mark.parametrize(("body", "why"), LOST.items(), ids=[f.__name__ for f in LOST])
def test_a_functional_host_that_would_lose_something_is_refused(body, why):
    net = Around(body)
    (site,) = prifu.sites(net)
    assert re.search(why, site.refused)
    with pytest.raises(NoSiteError, match=why):
        prifu.wrap(net)


class Inside(nn.Module):
    """A part that can be pruned, in a forward that a graph cannot hold."""

    def __init__(self, body):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.part = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)
        )
        self.body = body

    def forward(self, x):
        return self.part(self.body(self, x).to(x.dtype))


@pytest.mark.parametrize("body", [half_precision, without_gradients, layer_drop_of_torch])
def test_such_a_model_is_pruned_in_parts_and_keeps_it(body):
    torch.manual_seed(0)
    wrapped, x = prifu.wrap(Inside(body)).eval(), torch.randn(6, 4)
    for unit in prifu.filters(wrapped).values():
        unit.weight.data[::2] = 0.0
    pruned = prifu.prune(wrapped, x)
    assert prifu.report(pruned).notes[0][1].startswith("pruned in parts")
    assert pruned.part.get_submodule("0").out_features == 4
    outputs = []
    for model in (wrapped, pruned):
        torch.manual_seed(3)
        outputs.append(model(x))
    assert difference(*outputs) < 1e-5
    outputs[1].sum().backward()
    assert (pruned.layer.weight.grad is None) == (body is without_gradients or "rop" in str(body))
    with pytest.raises(CaptureError, match="cannot be traced"):
        prifu.split(wrapped, "layer", x)


def test_what_changes_nothing_here_is_no_reason_to_stop():
    with only_operations(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        assert torch.is_grad_enabled()


class Made(nn.Module):
    """Tensors of the default type, and casts."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.last = nn.Linear(4, 4)
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        y = self.part(x)
        mask = (y > 0).float() + torch.ones(4)
        state = torch.zeros(1, x.shape[0], 4)
        out, _ = self.rnn((y * mask).to(torch.float32)[:, None], (state, state))
        return self.last(out[:, 0])


def test_casts_and_tensors_of_the_default_type_run_in_fp64():
    torch.manual_seed(0)
    wrapped, x = prifu.wrap(Made()).eval(), torch.randn(6, 4)
    prifu.filters(wrapped)["part.1"].weight.data[::2] = 0.0
    pruned = prifu.prune(wrapped, x)
    assert {check.dtype for check in prifu.report(pruned).checks} == {"float64", "float32"}
    torch.testing.assert_close(pruned(x), wrapped(x))


class Dropping(nn.Module):
    """Functional dropout, off by its flag or by its rate."""

    def __init__(self, rate):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.rate = rate

    def forward(self, x):
        return self.b(F.dropout(self.n(self.a(x)), self.rate, self.training))


@pytest.mark.parametrize("rate", [0.2, 0.0])
def test_dropout_that_is_lost_is_named(rate):
    pruned = prifu.prune(prifu.wrap(Dropping(rate)), torch.zeros(2, 4))
    notes = [why for _, why in prifu.report(pruned).notes]
    assert any("functional dropout" in why for why in notes) == (rate > 0)


def test_attributes_that_change_all_the_time_leave_little_behind():
    net = Around(lambda self, x: x * self.scale)
    net.nothing = float("nan")
    wrapped, x = prifu.wrap(net), torch.randn(6, 4)
    held = inspect.getclosurevars(type(wrapped).forward).globals["call"]
    forwards = inspect.getclosurevars(held).nonlocals["forwards"].by_key
    for scale in (2.0, *torch.linspace(0, 1, 20).tolist(), 2.0):
        net.scale = wrapped.scale = scale
        torch.testing.assert_close(wrapped(x), net(x))
    assert all(len(found) <= 8 for found in forwards.values())
    before = sum(map(len, forwards.values()))
    wrapped(x)
    assert sum(map(len, forwards.values())) == before


def test_attributes_may_change_under_a_compiler():
    torch.manual_seed(0)
    net, x = Around(lambda self, x: x * self.scale), torch.randn(6, 4)
    wrapped = prifu.wrap(net)
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, backend="eager")
    for scale in (2.0, 3.0, 2.0, 4.0):
        net.scale = wrapped.scale = scale
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_normalizations_that_an_attribute_brings_or_takes_are_refused(scale):
    def body(self, x):
        return F.layer_norm(x, (4,)) if self.scale > 3 else x

    net, x = Around(body), torch.randn(6, 4)
    net.scale = 6.0 - scale
    wrapped = prifu.wrap(net)
    wrapped(x)
    wrapped.scale = scale
    with pytest.raises(CaptureError, match="which filter belongs to which"):
        wrapped(x)


class Number(Around):
    def forward(self, x, k=2.0):
        y = self.normed(x)
        return y * k if isinstance(k, torch.Tensor) else y + k


class Several(Around):
    def __init__(self):
        super().__init__(None)
        self.attention = nn.MultiheadAttention(4, 1)

    def forward(self, x):
        y = self.normed(x)
        y = self.attention(y, y, y)
        return y if isinstance(y, torch.Tensor) else y[0]


def test_numbers_and_tuples_are_no_tensors():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    net = Number(None).eval()
    torch.testing.assert_close(prifu.wrap(net).eval()(x, 3.0), net(x, 3.0))
    net = Several().eval()
    torch.testing.assert_close(prifu.wrap(net).eval()(x), net(x))


def test_numbers_of_numpy_and_attributes_that_go():
    net = Around(lambda self, x: x * np.sqrt(4.0) * getattr(self, "more", 1.0))
    x = torch.randn(6, 4)
    net.more = 2.0
    wrapped = prifu.wrap(net)
    for model in (net, wrapped):
        del model.more
    torch.testing.assert_close(wrapped(x), net(x))


def test_a_part_that_a_mask_copies_is_no_view():
    class Masked(Dropping):
        def forward(self, x):
            x = self.n(self.a(x))
            x[x > 0].zero_()
            return self.b(x)

    torch.manual_seed(0)
    wrapped, x = prifu.wrap(Masked(0.0)).eval(), torch.randn(6, 4)
    with pytest.raises(CaptureError, match="zero_|cannot be traced|branches"):
        prifu.prune(wrapped, x, verify=False)


class Kind(enum.Enum):
    DOUBLE, HALVE = 2.0, 0.5


@dataclass
class Settings:
    factors: list[float]


READS = {
    "what was not there": (
        lambda self, x: x * getattr(self, "later", 1.0),
        lambda m: setattr(m, "later", 3.0),
    ),
    "an enumeration": (
        lambda self, x: x * self.kind.value,
        lambda m: setattr(m, "kind", Kind(0.5)),
    ),
    "a function of torch": (
        lambda self, x: self.builtin(x),
        lambda m: setattr(m, "builtin", torch.sigmoid),
    ),
    "a list in a list": (
        lambda self, x: x * self.nested[0][0],
        lambda m: m.nested[0].__setitem__(0, 5.0),
    ),
    "settings": (
        lambda self, x: x * self.settings.factors[0],
        lambda m: m.settings.factors.__setitem__(0, 5.0),
    ),
    "a child": (
        lambda self, x: x if self.extra is None else self.extra(x),
        lambda m: setattr(m, "extra", None),
    ),
    "no child": (
        lambda self, x: x if self.nothing is None else self.nothing(x),
        lambda m: setattr(m, "nothing", nn.Tanh()),
    ),
}


@pytest.mark.parametrize(("body", "change"), READS.values(), ids=READS)
def test_what_a_functional_host_reads_in_other_ways_stays_alive(body, change):
    torch.manual_seed(0)
    net, x = Around(body), torch.randn(6, 4)
    net.kind, net.builtin, net.nested = Kind.DOUBLE, torch.tanh, [[2.0]]
    net.settings, net.extra, net.nothing = Settings([2.0]), nn.Sigmoid(), None
    wrapped = prifu.wrap(net)
    torch.testing.assert_close(wrapped(x), net(x))
    for model in (net, wrapped):
        change(model)
    torch.testing.assert_close(wrapped(x), net(x))


def changing_a_tensor(self, x):
    self.plain.add_(1)
    return x


def changing_an_array(self, x):
    self.array[0] += 1
    return x


def changing_a_queue(self, x):
    self.queue.append(1)
    return x


def drawing_of_its_own(self, x):
    return x * float(self.random.random())


def drawing_of_its_own_in_torch(self, x):
    return x * float(torch.rand((), generator=self.generator))


def asking_for_autocast(self, x):
    return x * 2 if torch.is_autocast_enabled() else x


HIDDEN = {
    changing_a_tensor: "changes the values in plain",
    changing_an_array: "changes the values in array",
    changing_a_queue: "changes an item of queue",
    drawing_of_its_own: "changes the values in random",
    drawing_of_its_own_in_torch: "changes the values in generator",
    asking_for_autocast: "asks for autocast",
}


@pytest.mark.parametrize(("body", "why"), HIDDEN.items(), ids=[f.__name__ for f in HIDDEN])
def test_what_a_functional_host_changes_in_hidden_places_is_refused(body, why):
    net = Around(body)
    net.plain, net.array, net.queue = torch.zeros(2), np.zeros(2), deque([0])
    net.random, net.generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    (site,) = prifu.sites(net)
    assert re.search(why, site.refused or "")


def test_a_trace_is_felt_by_no_other_thread():
    started, done, errors = threading.Event(), threading.Event(), []

    def work():
        started.wait(10)
        try:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                assert not torch.is_grad_enabled()
            with torch.inference_mode():
                pass
        except BaseException as error:
            errors.append(error)
        done.set()

    class Waiting(nn.Module):
        def forward(self, x):
            started.set()
            assert done.wait(10)
            return x * 2

    thread = threading.Thread(target=work)
    thread.start()
    capture(nn.Sequential(Waiting()))
    thread.join()
    assert not errors


def test_two_threads_trace_in_turn():
    def work():
        for _ in range(3):
            capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
            functional_calls(Around(lambda self, x: x))

    kept = torch._C._set_grad_enabled, torch.is_grad_enabled, isinstance, len
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    assert (torch._C._set_grad_enabled, torch.is_grad_enabled, isinstance, len) == kept


@dataclass(eq=False)
class Unequal:
    factor: float = 2.0
    hidden: float = field(default=1.0, compare=False)


def test_settings_that_are_equal_to_nothing_are_compared_by_their_fields():
    net, x = (
        Around(lambda self, x: x * self.settings.factor * self.settings.hidden),
        torch.randn(6, 4),
    )
    net.settings = Unequal()
    wrapped = prifu.wrap(net)
    traces = []
    with pytest.MonkeyPatch.context() as patch:
        known = functional.trace_alone
        patch.setattr(functional, "trace_alone", lambda *a: traces.append(1) or known(*a))
        for _ in range(3):
            torch.testing.assert_close(wrapped(x), net(x))
        assert not traces
        for name in ("factor", "hidden"):
            for model in (net, wrapped):
                setattr(model.settings, name, 5.0)
            torch.testing.assert_close(wrapped(x), net(x))
    assert len(traces) == 2


def test_a_forward_that_seeds_is_refused():
    def body(self, x):
        torch.manual_seed(0)
        return x + torch.rand_like(x)

    (site,) = prifu.sites(Around(body))
    assert "seeds random numbers" in site.refused


def test_operators_of_higher_order_pass():
    def body(x):
        return torch.cond(x.sum() > 1e9, torch.sin, torch.cos, (x,))

    with only_operations(lambda: True), DrawingAlike(), torch.no_grad():
        assert body(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_a_forward_that_seeds_by_name_is_refused_in_the_same_words():
    class Seeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            torch.manual_seed(seed=0)
            return self.norm(x)

    with pytest.raises(CaptureError, match="it seeds random numbers itself"):
        capture(Seeds(), 1)


def test_a_patch_that_waits_for_another_puts_back_what_was_there():
    inside, done = threading.Event(), threading.Event()

    def second():
        with patched(math, "sqrt", lambda x: "second"):
            inside.set()
            done.wait(10)

    with patched(math, "sqrt", lambda x: "first"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
    inside.wait(10)
    try:
        assert math.sqrt(4) == 2
    finally:
        done.set()
        thread.join()
