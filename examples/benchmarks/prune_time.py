"""Where prune's time goes, for the networks of the sweep that take longest.

    python examples/benchmarks/prune_time.py --below 2.5e7 > docs/results/prune-time.txt

The five that took longest are read from docs/results/zoo.json. Time is given in forward passes of
the filtered network on the same batch, one thread; shares are of the time of one run, in the order
of the passes, and "the model itself" is what all of them spend in running a network.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import prifu_plugin as prifu

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

PASSES = {
    "capture": [("ladder.py", "recorded")],
    "facts": [("rules/__init__.py", "analyse")],
    "plan": [("planner.py", "make_plan")],
    "rewrite": [("rewrite.py", "rewrite")],
    "certificate": [("certificate.py", "certify"), ("parts.py", "_certify")],
    "the model itself": [("undisturbed.py", "run_undisturbed")],
}


def slowest(count, below):
    """Return the networks that took longest, of those with fewer parameters than that."""
    rows = json.loads((ROOT / "docs" / "results" / "zoo.json").read_text())["rows"]
    timed = [row for row in rows if "seconds_prune" in row and row["parameters"] < below]
    timed.sort(key=lambda row: row["seconds_prune"], reverse=True)
    return [row["name"] for row in timed[:count]]


def measure(name):
    """Return prune's time in forward passes, and the share of each pass."""
    import sweep
    import zoo

    model, inputs, _ = sweep.built(name)
    wrapped = zoo.half_off(prifu.wrap(model.eval()))
    with torch.no_grad():
        wrapped(*inputs)
        start = time.perf_counter()
        wrapped(*inputs)
        forward = time.perf_counter() - start
    start = time.perf_counter()
    prifu.prune(wrapped, inputs)
    taken = time.perf_counter() - start
    profile = cProfile.Profile()
    profile.runcall(prifu.prune, wrapped, inputs)
    return taken / forward, shares(pstats.Stats(profile))


def shares(stats):
    """Return the share of the profiled time that each pass takes, with what it calls."""
    found = dict.fromkeys(PASSES, 0.0)
    for (file, _, function), (_, _, _, cumulative, _) in stats.stats.items():
        for label, places in PASSES.items():
            if any(file.endswith(f"/{end}") and function == called for end, called in places):
                found[label] += cumulative / stats.total_tt
    return found


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", help="instead of the slowest ones")
    parser.add_argument("--below", type=float, default=1e8, help="parameters, to leave out giants")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; half of all channels closed at random, seed 0")
    print("| network | forward passes | " + " | ".join(PASSES) + " |")
    print("|---|---|" + "---|" * len(PASSES))
    for name in tqdm(args.models or slowest(5, args.below), disable=None):
        passes, found = measure(name)
        cells = [f"{100 * share:.0f} %" for share in found.values()]
        print(f"| {name} | {passes:.0f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
