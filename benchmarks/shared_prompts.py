"""Scoring 1,000 four-choice questions: a prompt read once for its choices, against one request after the other.

    python benchmarks/shared_prompts.py --model ../shared/models/trivia-7m --data ../shared/data/medmcqa/train.jsonl.gz

Sides take turns on blocks of 200 questions; each block gives a ratio of times. Needs a model folder and MedMCQA's rows.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from smf.shared_prompts import SharedPromptLM
from smf.tasks import medmcqa

SIDES: dict[str, tuple[Any, int]] = {
    "one by one (HFLM, batch 1)": (HFLM, 1),
    "HFLM, batch 32": (HFLM, 32),
    "shared prompts, batch 32": (SharedPromptLM, 32),
}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--block", type=int, default=200)
    parser.add_argument("--output", default="benchmarks/results/shared_prompts.json")
    given = parser.parse_args()
    with gzip.open(given.data, "rt") as file:
        rows = medmcqa.select([json.loads(line) for line in file], given.data)[: given.questions]
    items = [medmcqa.item(row) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    largest, picks = 0.0, 0
    for start in range(0, len(items), given.block):
        block = items[start : start + given.block]
        found = {}
        for side, (kind, size) in SIDES.items():
            found[side], took = scored(kind, size, model, tokenizer, block)
            seconds[side].append(took)
        one, _, ours = found.values()
        largest = max([largest, *(abs(a - b) for a, b in zip(one, ours, strict=True))])
        picks += sum(pick(one, i) != pick(ours, i) for i in range(len(block)))
        print({side: round(took[-1], 1) for side, took in seconds.items()}, flush=True)
    names = list(SIDES)
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds[names[-1]], strict=True)] for name in names[:-1]}
    result = {
        "command": f"python benchmarks/shared_prompts.py --model {given.model} --data {given.data}",
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "questions": len(items),
        "seconds": seconds,
        "times as fast": {name: {"median": statistics.median(r), "blocks": r} for name, r in ratios.items()},
        "largest difference of a log-probability": largest,
        "other picks": picks,
    }
    Path(given.output).write_text(json.dumps(result, indent=2) + "\n")
    print(
        json.dumps({key: result[key] for key in ("times as fast", "largest difference of a log-probability")}, indent=2)
    )


def scored(kind: Any, size: int, model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> tuple[list[float], float]:
    """Log-probabilities of all choices, question by question, and the seconds they took, tokenising included."""
    requests = [SimpleNamespace(args=(item["prompt"], choice)) for item in items for choice in item["choices"]]
    with contextlib.redirect_stderr(io.StringIO()):
        lm = kind(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=512, add_bos_token=False)
        started = time.perf_counter()
        found = lm.loglikelihood(requests, disable_tqdm=True)
    return [value for value, _ in found], time.perf_counter() - started


def pick(values: list[float], question: int) -> int:
    """The likeliest of a question's four choices."""
    own = values[4 * question : 4 * question + 4]
    return own.index(max(own))


if __name__ == "__main__":
    main()
