"""What the base's own scores say against a comparison, before anything trains: nothing to learn, or nothing to lose."""

from __future__ import annotations

import math
from typing import Any

SOLVED = 0.95  # share of right answers from which on a target is no longer learned
NATS_SOLVED = 0.05  # nats per token of right answers below which it is known by heart
ERRORS = 2.0  # standard errors around chance that count as chance


def doubts(scores: dict[str, Any]) -> list[str]:
    """One sentence for each target that the base already solves and each probe that it answers by chance.

    Args:
        scores: of the base, by set, with records.
    """
    found = []
    for name, score in scores.items():
        metrics, records = score["metrics"], score["records"]
        metric = next((m for m in ("acc", "exact_match", "alias", "score") if m in metrics), None)
        if score["role"] == "target" and metric is not None and metrics[metric] >= SOLVED:
            found.append(f"the base already solves the target {name!r} ({metric} {metrics[metric]:.2f})")
        elif score["role"] == "target" and metric is None and metrics.get("loss", math.inf) < NATS_SOLVED:
            found.append(f"the base already knows the target {name!r} ({metrics['loss']:.3f} nats per token)")
        if score["role"] == "probe" and metric is not None and _by_chance(metrics[metric], records):
            found.append(
                f"the base answers the probe {name!r} by chance ({metric} {metrics[metric]:.2f}): it "
                "has nothing to lose there"
            )
    return found


def _by_chance(share: float, records: list[dict[str, Any]]) -> bool:
    """Within two standard errors of guessing among as many choices; nothing right, where there are none."""
    counts = [record.get("choices") or len(record.get("logprobs") or ()) for record in records]
    counts = [count for count in counts if count]
    if not counts:
        return share == 0
    chance = sum(1 / count for count in counts) / len(counts)
    return share <= chance + ERRORS * math.sqrt(chance * (1 - chance) / len(counts))
