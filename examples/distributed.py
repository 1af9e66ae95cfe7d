"""Train with filters on several processes or machines, one word more than alone: torchrun.

torchrun --nproc_per_node=2 examples/distributed.py            # one machine
torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
    examples/distributed.py                                    # the same line on each of four

Masks follow from weights, and weights are the same everywhere: filters say nothing to each other.
"""

import argparse
import os
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import prifu_plugin as prifu
from prifu_plugin.data.digits import load_digits


def main(args):
    """Train on this process's share of the images; process 0 prints and writes."""
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    torch.manual_seed(0)

    digits = load_digits(0).part(0, 256 if args.smoke else 4000)
    data = TensorDataset(torch.nn.Upsample(64)(digits.images), digits.parity)
    sampler = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, args.batch_size, sampler=sampler, drop_last=True)

    beta = prifu.dose_to_beta(args.dose, [args.lr] * len(loader) * args.epochs)
    model = prifu.wrap(timm.create_model("test_resnet", num_classes=2), beta=beta)
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if gpu else model
    model = model.to(device)
    parallel = DistributedDataParallel(model)  # after wrap, so that it knows the filters
    optimizer = torch.optim.SGD(parallel.parameters(), args.lr, momentum=0.9)

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        bar = tqdm(loader, desc=f"epoch {epoch}", disable=None if rank == 0 else True)
        for images, labels in bar:
            loss = torch.nn.functional.cross_entropy(parallel(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if rank == 0 and not bar.disable:
                state = prifu.status(model)
                bar.set_postfix(open=f"{state['open share']:.0%}", dose=f"{state['dose']:.2f}")
    if rank == 0:
        state = prifu.status(model)
        print(f"{state['open']} of {state['channels']} channels open, dose {state['dose']:.2f}")
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), Path(args.out) / "wrapped.safetensors")
            pruned = prifu.prune(model, data[0][0][None])
            print(prifu.report(pruned))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--dose", type=float, default=1.0)
    parser.add_argument("--out", help="folder for the weights")
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.epochs, arguments.dose = 1, 0.1
    main(arguments)
