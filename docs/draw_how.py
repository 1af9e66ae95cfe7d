"""Draw docs/how-it-works.svg, the picture in README: python docs/draw_how.py."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "prifu"
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

OPEN, CLOSED, INK, PAPER = "#2e6f95", "#d8dee9", "#2b303b", "#f4f6f9"
MASKS = [[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0]]


def box(axes, x, y, width, height, text):
    """Draw a rounded box with text in it."""
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.06",
                           facecolor=PAPER, edgecolor=INK, linewidth=1)  # fmt: skip
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color=INK)


def bars(axes, x, y, mask, hollow):
    """Draw one channel a bar; closed ones are grey, or absent."""
    for position, is_open in enumerate(mask):
        if is_open or hollow:
            axes.add_patch(plt.Rectangle((x + 0.11 * position, y), 0.08, 0.42, linewidth=0,
                                         facecolor=OPEN if is_open else CLOSED))  # fmt: skip


def row(axes, y, title, hollow, norm):
    """Draw one network of three layers."""
    axes.text(0, y + 0.95, title, fontsize=9.5, color=INK, weight="bold", va="center")
    for place, mask in enumerate(MASKS):
        x = 0.05 + place * 2.55
        kept = sum(mask)
        text = "conv\n6 channels" if hollow else f"conv\n{kept} channels"
        box(axes, x, y, 0.85, 0.6, text)
        bars(axes, x + 1.5, y + 0.09, mask if hollow else [1] * kept, hollow)
        axes.text(x + 1.2, y + 0.3, norm, fontsize=7, ha="center", va="center", color=INK)
        width = 0.66 if hollow else 0.11 * kept
        axes.annotate("", (x + 2.5, y + 0.3), (x + 1.53 + width, y + 0.3),
                      arrowprops={"arrowstyle": "->", "color": INK, "lw": 0.8})  # fmt: skip
    box(axes, 7.7, y, 0.75, 0.6, "head")


def main():
    """Draw and save."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    row(axes, 2.6, "wrap + train: a weight behind every norm; light channels are set to 0", True,
        "norm\n× W")  # fmt: skip
    row(axes, 0.6, "prune: the same function, the zeroed channels physically gone", False, "norm")
    axes.annotate("", (4.2, 1.75), (4.2, 2.4), arrowprops={"arrowstyle": "-|>", "color": INK})
    axes.text(4.35, 2.06, "facts → plan → rewrite → verify: equal in fp64 at other batch sizes and "
              "resolutions", fontsize=8, va="center", color=INK)  # fmt: skip
    axes.text(0, 0.12, "Constants left behind by closed channels are folded into biases, carried "
              "or mapped through padding; residual branches keep masks of their own.",
              fontsize=7.5, color=INK)  # fmt: skip
    axes.set(xlim=(-0.05, 8.6), ylim=(0, 3.75))
    axes.axis("off")
    path = Path(__file__).parent / "how-it-works"
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig("out/how.png", dpi=110)


if __name__ == "__main__":
    main()
