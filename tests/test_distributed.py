"""Two processes: masks need no communication of their own."""

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.debug import CommDebugMode

import prifu_plugin as prifu

STEPS = 50


def network():
    torch.manual_seed(0)
    first, second = [nn.LayerNorm(16), nn.ReLU()], [nn.LayerNorm(5), nn.Linear(5, 2)]
    layers = nn.Linear(4, 16), *first, nn.Linear(16, 5), *second
    return prifu.wrap(nn.Sequential(*layers), beta=0.2, alpha=0.1)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator)
    return x, (x[:, 0] > 0).long()


SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}


def train(model, part, steps=STEPS, zero=False, micro=1, dtype=None):
    """Train on one part of every batch, in micro-batches, of which the last exchanges gradients."""
    if zero:  # the optimizer of each process steps a share of the weights and sends them around
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=torch.optim.SGD, **SETTINGS
        )
    else:
        optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        pieces = list(zip(x[part].chunk(micro), y[part].chunk(micro), strict=True))
        for place, (images, labels) in enumerate(pieces):
            with exchanging(model, place == micro - 1):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = nn.functional.cross_entropy(model(images), labels)
                (loss / micro).backward()
        optimizer.step()


@contextlib.contextmanager
def exchanging(model, last):
    """Exchange gradients between processes in the last of the micro-batches only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        yield
    elif hasattr(model, "no_sync") and not last:
        with model.no_sync():
            yield
    else:
        yield


FORMS = {"accumulated": {"micro": 2}, "bf16": {"dtype": torch.bfloat16, "steps": 10}}


def trained_forms(kind, part):
    """Train a model in each of the forms, sharded layer by layer or replicated; return all W."""
    found = {}
    for name, form in FORMS.items():
        model = network()
        if kind == "fsdp2":
            for layer in (model[0], model[1], model[3]):
                fully_shard(layer)
            fully_shard(model)
        else:
            model = nn.parallel.DistributedDataParallel(model)
        train(model, part, **form)
        found[name] = weights_of(model if kind == "fsdp2" else model.module)
    return found


def weights_of(model):
    weights = [unit.weight.detach() for unit in prifu.filters(model).values()]
    whole = [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]
    return [w.tolist() for w in whole]


def resumed(folder, part):
    """Train in one go, and with a distributed checkpoint of the model between; return both W."""
    once = fully_shard(network())
    train(once, part, steps=20)
    train(once, part, steps=5)
    first = fully_shard(network())
    train(first, part, steps=20)
    dcp.save(get_model_state_dict(first), checkpoint_id=str(Path(folder) / "checkpoint"))
    again = fully_shard(network())
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=str(Path(folder) / "checkpoint"))
    set_model_state_dict(again, state)
    train(again, part, steps=5)
    return weights_of(once), weights_of(again)


def late(kind):
    """Wrap a model that is distributed already; return what is said of it."""
    net = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16))
    if kind != "fsdp2":
        holder = nn.parallel.DistributedDataParallel(net)
    else:
        holder = fully_shard(net)
    try:
        prifu.wrap(net, inplace=True)
    except prifu.errors.OrderError as error:
        return str(error)
    return f"nothing was said of {type(holder).__name__}"


def late_part(kind):
    """Wrap a part of a model that is distributed already; return what is said of it."""
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16)), nn.Linear(16, 2))
    holder = nn.parallel.DistributedDataParallel(net) if kind != "fsdp2" else fully_shard(net)
    try:
        prifu.wrap(net[0], inplace=True)
    except prifu.errors.OrderError as error:
        return str(error)
    return f"nothing was said of {type(holder).__name__}"


def broken(rank, where):
    """Train with a number that is not finite in one process; return what is said in each."""
    model = fully_shard(network())
    if where == "W" and rank == 0:
        next(iter(prifu.filters(model).values())).weight.detach().to_local()[0] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    x, y = batch(0)
    if where == "the gradient" and rank == 0:
        x[0, 0] = float("nan")
    part = slice(8 * rank, 8 * rank + 8)
    nn.functional.cross_entropy(model(x[part]), y[part]).backward()
    try:
        optimizer.step()
    except prifu.errors.FilterError as error:
        return str(error)
    return "nothing was said"


def narrow():
    """Train a filter with fewer channels than processes."""
    model = prifu.wrap(nn.Sequential(nn.Linear(4, 1), nn.LayerNorm(1), nn.Linear(1, 2)), beta=0.2)
    fully_shard(model)
    train(model, slice(0, 8), steps=2)
    return prifu.status(model)


def refused(model):
    """Call what needs whole weights; return what is said."""
    said = []
    data = [batch(0)]
    for call in (
        lambda: prifu.sweep(model, data, [0.1]),
        lambda: prifu.relevance(model, data),
        lambda: prifu.prune(model, torch.zeros(2, 4)),
        lambda: prifu.summary(model),
    ):
        try:
            call()
        except prifu.errors.OrderError as error:
            said.append(str(error))
    prifu.influence(model, *batch(0))
    train(model, slice(0, 8), steps=2)  # which goes on
    return said


def main(kind, folder):
    """Train in one of the processes that torchrun started, and write down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    said, said_of_part = late(kind), late_part(kind)
    model = network()
    if kind == "fsdp2":
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    train(model, slice(8 * rank, 8 * rank + 8), zero=kind == "zero")
    inner = model if kind == "fsdp2" else model.module
    units = prifu.filters(inner)
    with CommDebugMode() as calls:
        optimizer = torch.optim.SGD([unit.weight for unit in units.values()], lr=0.0)
        optimizer.step()
        status = prifu.status(inner)
    found = {"weights": weights_of(inner), "status": status, "said": said}
    part = slice(8 * rank, 8 * rank + 8)
    found["forms"] = {} if kind == "zero" else trained_forms(kind, part)
    found["resumed"] = resumed(folder, part) if kind == "fsdp2" else None
    found["part"] = said_of_part
    found["broken"] = (
        ["not finite" in broken(rank, where) for where in ("W", "the gradient")]
        if kind == "fsdp2"
        else None
    )
    found["calls"] = calls.get_total_counts()
    found["narrow"] = narrow() if kind == "fsdp2" else None
    found["refused"] = refused(inner) if kind == "fsdp2" else None
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    if kind == "ddp" and rank == 0:
        torch.save(inner.state_dict(), Path(folder) / "only_rank_0.pt")
    dist.barrier()
    dist.destroy_process_group()
    # The interpreter's own shutdown may end while gloo's threads still run, which aborts.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero", marks=pytest.mark.long)])
def test_masks_agree_and_equal_one_process(kind, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    subprocess.run([sys.executable, *command, kind, str(tmp_path)], check=True, timeout=300)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    alone = network()
    train(alone, slice(0, 16))
    for found_weight, unit in zip(found[0]["weights"], prifu.filters(alone).values(), strict=True):
        weight, expected = torch.tensor(found_weight), unit.weight.detach()
        assert torch.equal(weight == 0, expected == 0)
        assert (expected == 0).any()
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)
    for name, weights in found[0]["forms"].items():
        alone_too = network()
        train(alone_too, slice(0, 16), **FORMS[name])
        rough = {"atol": 0.03, "rtol": 0} if name == "bf16" else {"atol": 1e-5, "rtol": 1e-3}
        for seen, expected in zip(weights, weights_of(alone_too), strict=True):
            torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), **rough)
    expected_status = prifu.status(alone)
    assert found[0]["status"] == pytest.approx(expected_status, rel=1e-6)
    # Replicated weights need no word between processes; of shards, all must know whether they are
    # finite, and what they are together.
    assert found[0]["calls"] == (2 if kind == "fsdp2" else 0)
    assert ("sharded by FSDP" if kind == "fsdp2" else "inside DDP") in found[0]["part"]
    assert ("sharded by FSDP" if kind == "fsdp2" else "inside DDP") in found[0]["said"]
    if kind == "ddp":
        fresh = network()
        fresh.load_state_dict(torch.load(tmp_path / "only_rank_0.pt"))
        assert torch.equal(prifu.filters(fresh)["4"].weight, weight)
    if kind == "fsdp2":
        once, again = found[0]["resumed"]
        assert once == again
        assert found[0]["narrow"]["open"] == 1
        assert found[0]["broken"] == [True, True]
        assert len(found[0]["refused"]) == 4
        assert all("Gather the weights" in said for said in found[0]["refused"])


@pytest.fixture
def one_process(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_over_one_process_it_is_the_same(one_process):
    plain, sharded = network(), network()
    fully_shard(sharded)
    for model in (plain, sharded):
        train(model, slice(0, 16))
    assert prifu.status(sharded) == pytest.approx(prifu.status(plain))
    assert prifu.status(plain)["open share"] < 1
    history = prifu.MaskHistory(sharded)
    assert history.record(step=0)["closed now"] == 0
    units = zip(prifu.filters(plain).values(), prifu.filters(sharded).values(), strict=True)
    for unit, shard in units:
        torch.testing.assert_close(shard.weight.full_tensor(), unit.weight)
        assert torch.equal(shard.open, unit.open)
    said = refused(sharded)
    assert len(said) == 4
    assert all("Gather the weights" in text for text in said)
    first = next(iter(prifu.filters(sharded).values()))
    first.weight.detach().to_local()[2] = float("nan")
    with pytest.raises(prifu.errors.FilterError, match="not finite at channel 2 of 16"):
        train(sharded, slice(0, 16), steps=1)


def test_a_copy_in_ddp_is_refused_by_name():
    class DistributedDataParallel(nn.Module):  # a real one needs processes
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(prifu.errors.OrderError, match="DDP"):
        prifu.wrap(DistributedDataParallel(copy.deepcopy(nn.Sequential(nn.BatchNorm1d(2)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
