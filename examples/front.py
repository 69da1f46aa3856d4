"""Learning against forgetting, as a picture for a page: what each method gained, and what it lost of each probe.

python examples/front.py runs/demo/summary.json docs/results/demo.png
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tyro
from tyro.conf import Positional

GAIN = "held-out acc"
LOSSES = {  # panels: the change of a score, and how a loss of it counts
    "near-domain acc": ("near domain, points forgotten", -100),
    "closed-book exact_match": ("closed-book, points forgotten", -100),
    "general-text nats": ("text, nats per token forgotten", 1),
}


def main(summary: Positional[Path], output: Positional[Path]) -> None:
    """Draw the methods of a summary.json of the embedded world, with their intervals.

    Args:
        summary: written by `smf demo` or `smf compare`.
        output: an image.
    """
    methods = json.loads(summary.read_text())["methods"]
    figure, panels = plt.subplots(1, len(LOSSES), figsize=(12, 3.8), layout="constrained")
    for axes, (loss, (label, sign)) in zip(panels, LOSSES.items(), strict=True):
        for place, method in enumerate(methods):
            gain, lost = _bar(method["changes"][GAIN], 100), _bar(method["changes"][loss], sign)
            axes.errorbar(
                gain[0],
                lost[0],
                xerr=gain[1],
                yerr=lost[1],
                fmt="os^Dvp*h"[place % 8],
                capsize=3,
                label=method["method"],
            )
        axes.set(xlabel="held-out, points gained", ylabel=label)
        axes.axhline(0, color="grey", linewidth=0.5)
    panels[0].legend(frameon=False)
    figure.savefig(output, dpi=110)


def _bar(change: dict[str, Any], scale: float) -> tuple[float, list[list[float]]]:
    """The scaled change, and how far its interval reaches below and above; nowhere where there is none."""
    ends = [change["value"] if change[end] is None else change[end] for end in ("low", "high")]
    low, high = sorted(scale * end for end in ends)
    middle = scale * change["value"]
    if not math.isfinite(middle):
        raise SystemExit(f"no number to draw: {change}")
    return middle, [[middle - low], [high - middle]]


if __name__ == "__main__":
    tyro.cli(main)
