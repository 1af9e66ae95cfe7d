"""Two processes: masks need no communication of their own."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.debug import CommDebugMode

import prifu_plugin as prifu

STEPS = 50


def network():
    torch.manual_seed(0)
    layers = nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2)
    return prifu.wrap(nn.Sequential(*layers), beta=0.2, alpha=0.3)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator)
    return x, (x[:, 0] > 0).long()


SETTINGS = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}


def train(model, part, steps=STEPS, zero=False):
    if zero:  # the optimizer of each process steps a share of the weights and sends them around
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=torch.optim.SGD, **SETTINGS
        )
    else:
        optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()


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


def main(kind, folder):
    """Train in one of the processes that torchrun started, and write down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    said = late(kind)
    model = network()
    if kind == "fsdp2":
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    train(model, slice(8 * rank, 8 * rank + 8), zero=kind == "zero")
    inner = model if kind == "fsdp2" else model.module
    unit = prifu.filters(inner)["1"]
    with CommDebugMode() as calls:
        optimizer = torch.optim.SGD([unit.weight], lr=0.0)
        optimizer.step()
    weight = unit.weight.detach()
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    found = {"weight": weight.tolist(), "dose": unit.dose, "said": said}
    found["calls"] = calls.get_total_counts()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    if kind == "ddp" and rank == 0:
        torch.save(inner.state_dict(), Path(folder) / "only_rank_0.pt")
    dist.barrier()
    dist.destroy_process_group()
    # The interpreter's own shutdown may end while gloo's threads still run, which aborts.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero"])
def test_masks_agree_and_equal_one_process(kind, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    subprocess.run([sys.executable, *command, kind, str(tmp_path)], check=True, timeout=300)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    alone = network()
    train(alone, slice(0, 16))
    expected = prifu.filters(alone)["1"].weight.detach()
    weight = torch.tensor(found[0]["weight"])
    assert torch.equal(weight == 0, expected == 0)
    assert (expected == 0).any()
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)
    # Replicated weights need no word between processes; of shards, the largest weight is asked.
    assert found[0]["calls"] == (1 if kind == "fsdp2" else 0)
    assert ("sharded by FSDP" if kind == "fsdp2" else "inside DDP") in found[0]["said"]
    if kind == "ddp":
        fresh = network()
        fresh.load_state_dict(torch.load(tmp_path / "only_rank_0.pt"))
        assert torch.equal(prifu.filters(fresh)["1"].weight, weight)


def test_a_copy_in_ddp_is_refused_by_name():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(prifu.errors.OrderError, match="DDP"):
        prifu.wrap(Wrapper(copy.deepcopy(nn.Sequential(nn.BatchNorm1d(2)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
