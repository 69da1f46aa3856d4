"""Results as runs leave them, made up: small, exact and without any training."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smf.recipe import Method, Probe, Recipe, Source, Target
from smf.recipe_file import to_toml

N = 120  # questions of a set


def answers(share: float, n: int = N, turn: int = 0) -> list[int]:
    """0 and 1, exactly `share` of them 1; `turn` says which."""
    return [int((7 * i + turn) % n < round(share * n)) for i in range(n)]


def choices(role: str, right: list[int], loss: float = 1.0, cluster: int = 0, ids: str = "q") -> dict[str, Any]:
    """A set of questions with choices; `cluster` questions each are about one thing."""
    records = []
    for i, value in enumerate(right):
        record = {"id": f"{ids}{i}", "acc": value, "answer_norm": value, "nats": loss * 2, "tokens": 2}
        records.append(record | ({"cluster": f"c{i // cluster}"} if cluster else {}))
    mean = sum(right) / len(right)
    metrics = {"acc": mean, "answer_norm": mean, "loss": loss}
    return {"role": role, "task": "choices", "metrics": metrics, "records": records}


def text(nats: float, role: str = "probe", n: int = 12) -> dict[str, Any]:
    """A text whose documents differ around `nats` per token."""
    records = [{"id": f"{i}.0", "nats": 10 * nats * (1 + (i % 3 - 1) / 10), "tokens": 10} for i in range(n)]
    value = sum(r["nats"] for r in records) / (10 * n)
    metrics = {"nats": value, "perplexity": math.exp(min(value, 700))}
    if role == "divergence":
        return {"role": role, "task": "divergence", "metrics": {"nats": value}, "records": records}
    return {"role": role, "task": "perplexity", "metrics": metrics, "records": records}


def scores(
    held: float = 0.25,
    near: float = 1.0,
    nats: float = 2.0,
    validation: float | None = None,
    *,
    turn: int = 0,
    loss: float = 1.0,
    cluster: int = 0,
    chosen_by: bool = True,
) -> dict[str, Any]:
    """Of one model: a target, a validation set, two probes, a divergence; shares of right answers, nats per token."""
    found = {"held-out": choices("target", answers(held, turn=turn), loss, cluster, "held")}
    if chosen_by:
        share = held if validation is None else validation
        found["validation"] = choices("validation", answers(share), loss, 0, "val")
    found["near-domain"] = choices("probe", answers(near, turn=turn), 1.0, cluster, "near")
    found["general-text"] = text(nats)
    found["KL general-text"] = text(max(0.0, nats - 2.0), "divergence")
    return found


def result(
    method: str,
    end: dict[str, Any] | None = None,
    *,
    lr: float = 0.1,
    seed: int = 0,
    kind: str = "smf",
    on_the_way: dict[float, dict[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One run; `on_the_way` are the scores after shares of its steps."""
    base = kind == "base"
    method_options = asdict(Method(kind=kind, lr=0.0 if base else lr, rule="tf")) | options
    made = {"format": 1, "comparison": "here", "method": method, "kind": kind, "options": method_options, "seed": seed}
    made |= {"steps": 0 if base else 100, "seconds": 1.5, "heal_seconds": 0.0, "peak_memory_mb": 10.0}
    made |= {"rows_changed": 3, "trained_parameters": 9, "scores": scores() if end is None else end}
    made["provenance"] = {"machine": {"jobs": 1}}
    if on_the_way is not None:
        made["on_the_way"] = [{"step": round(100 * s), "share": s, "scores": each} for s, each in on_the_way.items()]
    return made


def base(**options: Any) -> dict[str, Any]:
    """The untouched model."""
    return result("base", scores(**options), kind="base")


def curve(method: str, learned: list[float], kept: list[float], *, lr: float = 0.1, **options: Any) -> dict[str, Any]:
    """A run whose target rises and whose near-domain probe falls, over equal shares of its steps."""
    turn = options.pop("turn", 0)
    moments = [scores(h, k, 2.0 + (1 - k), turn=turn) for h, k in zip(learned, kept, strict=True)]
    shares = [(i + 1) / len(moments) for i in range(len(moments) - 1)]
    return result(method, moments[-1], lr=lr, on_the_way=dict(zip(shares, moments, strict=False)), **options)


def recipe(output: Path | str = "runs", **methods: Method) -> Recipe:
    """That the results above could be of."""
    source = Source(path="some")
    target = Target(task="choices", train=source, eval={"held-out": source}, validation=source, metrics=["acc"])
    probes = {"near-domain": Probe("choices", source), "general-text": Probe("perplexity", source)}
    known = {"base": Method(kind="base"), "lora": Method(kind="lora", lr=0.1), "smf": Method(lr=0.1, rule="tf")}
    return Recipe(base="tiny", data="here", output=str(output), target=target, probes=probes, methods=methods or known)


def write(folder: Path, found: dict[str, Any] | str | bytes, own_recipe: Recipe | None = None) -> Path:
    """A run's folder with its result.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(found) if isinstance(found, dict) else found
    (folder / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    if own_recipe is not None:
        (folder / "recipe.toml").write_text(to_toml(own_recipe))
    return folder
