"""Every figure and table of the paper, then the runs in one file and a page of claims.

python examples/paper/all.py [--scale cpu|paper] [--smoke] [--cached]

Resumable: a run that is stored is not made again. A day of one core at the scale "cpu"; with
--cached, tables and pictures of stored runs in seconds.
"""

import subprocess
import sys

from lab.pages import gathered
from lab.runs import collect
from lab.scale import HERE, scale_from_command_line

TRAINING = ("table1", "fig4", "fig6", "fig7", "fig11")
ATTACKING = ("fig3", "table2", "table3", "comparison", "fig8", "table6", "finetune")


def main() -> None:
    """Run each script in a process of its own and gather what they found."""
    scale, cached = scale_from_command_line(__doc__)
    if cached:
        collect(scale)
    for name in ATTACKING if cached else TRAINING + ATTACKING:
        command = [sys.executable, str(HERE / f"{name}.py"), *sys.argv[1:]]
        subprocess.run(command, check=True)
    print(collect(scale))
    print(gathered(scale))


if __name__ == "__main__":
    main()
