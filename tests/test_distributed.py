"""Two processes: masks need no communication of their own."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

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


def train(model, part):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()


def worker(rank, port, kind, results):
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = network()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    train(model, slice(8 * rank, 8 * rank + 8))
    inner = model.module if kind == "ddp" else model
    weight = prifu.filters(inner)["1"].weight.detach()
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    results.put((rank, weight.tolist(), prifu.filters(inner)["1"].dose))
    dist.barrier()
    dist.destroy_process_group()
    # The interpreter's own shutdown may end while gloo's threads still run, which aborts.
    os._exit(0)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_masks_agree_and_equal_one_process(kind):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(worker, (free_port(), kind, results), nprocs=2, join=True)
    found = sorted(results.get() for _ in range(2))
    assert found[0][1:] == found[1][1:]
    alone = network()
    train(alone, slice(0, 16))
    expected = prifu.filters(alone)["1"].weight.detach()
    weight = torch.tensor(found[0][1])
    assert torch.equal(weight == 0, expected == 0)
    assert (expected == 0).any()
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)


def test_a_copy_in_ddp_is_refused_by_name():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(prifu.errors.OrderError, match="DDP"):
        prifu.wrap(Wrapper(copy.deepcopy(nn.Sequential(nn.BatchNorm1d(2)))))
