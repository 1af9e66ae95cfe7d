"""Do the attackers that the standard suite leaves out read more? The full suite beside it.

    python examples/benchmarks/suites.py --cuts pooled --methods 2 > docs/results/audit-suites.txt

On the painted digits of the paper's experiments: plain networks and filtered ones. The
difference is between the strongest attackers of the two suites, chosen by validation data, on the
same 1000 test images, with a 95 % interval from resampling them.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import prifu_plugin as prifu

sys.path.append(str(Path(__file__).resolve().parents[1] / "paper"))

from lab.datasets import load
from lab.methods import deploy
from lab.runs import run_of
from lab.scale import Scale

from prifu_plugin.audit.statistics import mean_interval

METHODS = [("plain", {}), ("PriFU", {}), ("PriFU", {"cut_filter": True, "noise": 0.1})]


def rows(scale, method, settings, cut, seed, most=None):
    """Audit one deployment with both suites; yields a line for each attribute, `most` of them."""
    run = run_of(scale, method, seed, cut=cut, **settings)
    study = load(run["data"], scale)
    deployed = deploy(run, study, scale)
    found = {}
    for suite in ("standard", "full"):
        report = prifu.audit(
            deployed.edge,
            study.attack,
            study.test,
            task=study.task,
            attributes=list(study.private)[:most],
            cloud=deployed.cloud,
            channel=deployed.channel,
            suite=suite,
            seeds=1,
            queries=1,
            reconstruct=False,
        )
        found[suite] = {row.name: row for row in report.attributes}
    for name, first in found["standard"].items():
        second = found["full"][name]
        gain = second.right - first.right
        yield name, first, second, mean_interval(gain)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", type=int, default=len(METHODS), help="the first so many")
    parser.add_argument("--cuts", nargs="+", default=["pooled", "early"])
    parser.add_argument("--smoke", action="store_true", help="one deployment on little data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scale = Scale("smoke" if args.smoke else "cpu")
    seeds, cuts = range(args.seeds), args.cuts
    methods = METHODS[: args.methods]
    todo = [(*method, cut, seed) for seed in seeds for cut in cuts for method in methods]
    print("| method | cut | seed | attribute | standard | by | full | by | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method, settings, cut, seed in tqdm(todo[:1] if args.smoke else todo, disable=None):
        told = f"{method} {settings or ''}".strip()
        most = 1 if args.smoke else None
        for name, first, second, gain in rows(scale, method, settings, cut, seed, most):
            cells = [told, cut, seed, name, f"{first.accuracy.value:.3f}", first.winner]
            cells += [f"{second.accuracy.value:.3f}", second.winner]
            cells += [f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
