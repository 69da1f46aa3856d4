"""What speaks against a comparison before anything trains: nothing to learn, nothing to lose, a warm-up too long."""

from __future__ import annotations

import math
from typing import Any

from .stats import RATIOS
from .tasks import find_task

SOLVED = 0.95  # share of right answers from which on a target is no longer learned
NATS_SOLVED = 0.05  # nats per token of right answers below which it is known by heart
NATS_GUESSED = 0.9  # of the nats of guessing among all tokens, from which on a text is read by chance
ERRORS = 2.0  # standard errors around chance that count as chance


def doubts(scores: dict[str, Any], vocabulary: int = 32_000) -> list[str]:
    """One sentence for each target that the base already solves and each probe that it answers by chance.

    A set is judged by the first metric of its task, which tables show and forgetting is made of.

    Args:
        scores: of the base, by set, with records.
        vocabulary: tokens that the base chooses among.
    """
    found = []
    for name, score in scores.items():
        metrics, records = score["metrics"], score["records"]
        if score["role"] not in ("target", "probe"):
            continue
        metric = find_task(score["task"]).METRICS[0]
        value, target = metrics[metric], score["role"] == "target"
        if metric in RATIOS:
            guessing = math.log(vocabulary)
            if target and value < NATS_SOLVED:
                found.append(f"the base already knows the target {name!r} ({value:.3f} nats per token)")
            elif not target and value >= NATS_GUESSED * guessing:
                found.append(
                    f"the base reads the probe {name!r} by chance ({value:.2f} nats per token; guessing among its "
                    f"{vocabulary:,} tokens gives {guessing:.2f}): it has nothing to lose there"
                )
        elif target and value >= SOLVED:
            found.append(f"the base already solves the target {name!r} ({metric} {value:.2f})")
        elif not target and _by_chance(value, records):
            found.append(
                f"the base answers the probe {name!r} by chance ({metric} {value:.2f}): it has nothing to lose there"
            )
    return found


def warmup_doubts(warmup: int, steps: int) -> list[str]:
    """A sentence where more than half of a training is warm-up.

    Args:
        warmup: steps of linear warm-up, of which the first has a rate of zero.
        steps: of the training.
    """
    if 2 * warmup <= steps:
        return []
    if warmup < steps:
        return [
            f"the warm-up of {warmup:,} steps is more than half of the training of {steps:,}; set train.warmup_steps"
        ]
    reached = f"{(steps - 1) / warmup:.0%}"
    return [
        f"the training of {steps:,} steps ends within its warm-up of {warmup:,}: the learning rate only reaches "
        f"{reached} of lr; set train.warmup_steps (a tenth of the steps, or 0)"
    ]


def _by_chance(share: float, records: list[dict[str, Any]]) -> bool:
    """Within two standard errors of guessing among as many choices; nothing right, where there are none."""
    counts = [record.get("choices") or len(record.get("logprobs") or ()) for record in records]
    counts = [count for count in counts if count]
    if not counts:
        return share == 0
    chance = sum(1 / count for count in counts) / len(counts)
    return share <= chance + ERRORS * math.sqrt(chance * (1 - chance) / len(counts))
