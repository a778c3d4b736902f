"""Draw docs/figures/architecture.svg: the parts of the network and what trains them (METHOD sections 2 to 5).

python docs/figures/architecture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

NETWORK, SCRIBBLE, LOSS, DATA = "#dbe9f6", "#fde3c8", "#f6d5d5", "#eeeeee"


def box(axes, x, y, text, color, width=1.75, height=0.72):
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=color,
            edgecolor="#444444",
            linewidth=1,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=8.6, color="#111111", linespacing=1.25)


def arrow(axes, *points, dashed=False, label="", at=None, ha="center"):
    style = {"color": "#444444", "linewidth": 1.2, "linestyle": (0, (4, 3)) if dashed else "-"}
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(start, end, strict=True), **style, solid_capstyle="butt")
    axes.add_patch(FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=12, shrinkA=0, shrinkB=0, **style))
    if label:
        axes.text(*at, label, fontsize=8, color="#444444", ha=ha, va="center")


def draw() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(12.5, 5))
    axes.set_xlim(0, 13.2)
    axes.set_ylim(0.15, 5.65)
    axes.axis("off")

    box(axes, 1.0, 3.2, "image\n(N, 3, H, W)", DATA)
    box(axes, 3.5, 3.2, "backbone\nres2 ... res5", NETWORK)
    box(axes, 6.0, 3.2, "pyramid pooling,\ndecoder, stride 4", NETWORK, width=1.95)
    box(axes, 8.6, 3.2, "segmentation\nhead", NETWORK)
    box(axes, 6.0, 4.75, "shallow embedding\nof 4 x 4 patches", NETWORK, width=1.95)
    box(axes, 10.55, 4.75, "local aggregation\n(LAM)", NETWORK)
    box(axes, 12.3, 3.2, "prediction p\nC classes", DATA, width=1.5)
    box(axes, 8.6, 1.65, "annotation head", SCRIBBLE)
    box(axes, 10.55, 1.65, "annotation\nprobability q", SCRIBBLE, width=1.5)
    box(axes, 3.5, 0.75, "scribbles\n255 = not annotated", DATA, width=1.95)
    box(axes, 12.3, 1.65, "BLP loss\nweight (1 - qp)²", LOSS, width=1.6)
    box(axes, 10.55, 0.75, "annotation loss", LOSS, width=1.6, height=0.5)

    arrow(axes, (1.88, 3.2), (2.62, 3.2))
    arrow(axes, (4.38, 3.2), (5.02, 3.2))
    arrow(axes, (6.98, 3.2), (7.72, 3.2))
    arrow(axes, (9.48, 3.2), (10.55, 3.2), (10.55, 4.38), label="logits", at=(10.0, 3.38))
    arrow(axes, (1.0, 3.57), (1.0, 4.75), (5.02, 4.75))
    arrow(axes, (6.98, 4.75), (9.67, 4.75), label="features: which pixels are alike", at=(8.32, 4.93))
    arrow(axes, (11.43, 4.75), (12.3, 4.75), (12.3, 3.57))
    arrow(axes, (6.0, 2.83), (6.0, 1.65), (7.72, 1.65), dashed=True, label="detached", at=(6.85, 1.83))
    arrow(axes, (9.48, 1.65), (9.79, 1.65))
    arrow(axes, (11.31, 1.65), (11.49, 1.65))
    arrow(axes, (12.3, 2.83), (12.3, 2.02))
    arrow(axes, (10.55, 1.28), (10.55, 1.0))
    arrow(axes, (4.49, 0.85), (9.74, 0.85))
    arrow(axes, (4.49, 0.62), (5.0, 0.62), (5.0, 0.28), (12.3, 0.28), (12.3, 1.28))
    axes.text(
        7.0,
        0.43,
        "what was drawn; from a set iteration on also pseudo labels",
        fontsize=8,
        color="#444444",
        ha="center",
    )
    axes.text(3.5, 3.85, "blue: also at inference", fontsize=8, color="#33658a", ha="center")
    axes.text(7.9, 1.12, "orange: in training only", fontsize=8, color="#b5651d", ha="center")
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "blpseg"  # the same file each time
    target = Path(__file__).with_name("architecture.svg")
    draw().savefig(target, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    print(target)
