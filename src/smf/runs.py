"""Reading the folders that runs left: which results there are, and which cannot be used and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, DataError
from .fingerprint import json_hash
from .recipe import Recipe
from .recipe_file import load_recipe
from .tasks import TASKS

FORMAT = 1  # of result.json
ROLES = ("target", "probe", "validation", "divergence")
NUMBER = (int, float)
Kinds = dict[str, type | tuple[type, ...]]
NEEDED: Kinds = {"method": str, "kind": str, "seed": int, "steps": int, "options": dict, "comparison": str}
OPTIONAL: Kinds = {"on_the_way": list, "provenance": dict, "rows_by_layer": dict}
COSTS = ("seconds", "heal_seconds", "peak_memory_mb", "rows_changed", "trained_parameters")  # numbers or null
MOMENT: Kinds = {"step": int, "share": NUMBER, "scores": dict}
SCORE: Kinds = {"role": str, "task": str, "metrics": dict, "records": list}


# -- one result -------------------------------------------------------------------------------------------------------


def read_result(path: Path) -> dict[str, Any]:
    """One run's result, with the folder that it lies in.

    Raises:
        DataError: saying what is wrong with the file.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"it cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        found = result.get("format") if isinstance(result, dict) else type(result).__name__
        raise DataError(f"its format is {found}; this version reads {FORMAT}")
    _expect(result, NEEDED, "")
    _expect(result, {key: kind for key, kind in OPTIONAL.items() if key in result}, "")
    _expect(result, {key: NUMBER for key in COSTS if result.get(key) is not None}, "")
    if "lr" in result["options"]:
        _expect(result["options"], {"lr": NUMBER}, "options.")
    machine = result.get("provenance", {}).get("machine", {})
    _expect({"jobs": 1} | machine if isinstance(machine, dict) else machine, {"jobs": int}, "provenance.machine.")
    moments = [*result.get("on_the_way", []), {"step": result["steps"], "share": 1.0, "scores": result.get("scores")}]
    for moment in moments:
        _expect(moment, MOMENT, "")
        if set(moment) != set(MOMENT):
            raise DataError(f"on_the_way has the keys {sorted(moment)}; expected {sorted(MOMENT)}")
        if not 0 < moment["share"] < 1 and moment is not moments[-1]:
            raise DataError(f"on_the_way has a share of {moment['share']}; expected one between 0 and 1")
        for name, score in moment["scores"].items():
            _check_score(score, f"scores.{name}: ")
    scored = [_examples(moment["scores"]) for moment in moments]
    if any(examples != scored[-1] for examples in scored):
        raise DataError("on its way it was scored on other examples, or by other metrics, than at its end")
    return result | {"folder": str(path.parent)}


def _expect(table: Any, keys: Kinds, where: str) -> None:
    for key, kind in keys.items():
        value = table.get(key) if isinstance(table, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            name = "number" if kind == NUMBER else getattr(kind, "__name__", "")
            raise DataError(f"{where}{key} is missing or no {name}")


def _check_score(score: Any, where: str) -> None:
    """Refuse a score that cannot be compared; numbers may be NaN, which training that diverged leaves."""
    _expect(score, SCORE, where)
    role, task, metrics, records = (score[key] for key in SCORE)
    if role not in ROLES or (role != "divergence" and task not in TASKS):
        raise DataError(f"{where}role {role!r} and task {task!r} are not known to this version")
    known = ("nats",) if role == "divergence" else TASKS[task].METRICS
    needed = known if "perplexity" in known else known[:1]  # what tables cannot do without
    _expect(metrics, dict.fromkeys([*needed, *metrics], NUMBER), f"{where}metrics.")
    if not all(isinstance(record, dict) for record in records) or not (records or role == "validation"):
        raise DataError(f"{where}records are missing or no tables")
    kinds: dict[str, set[type]] = {"id": {str, int}, "cluster": {str, int, type(None)}}
    for metric in set(known) & set(metrics):
        keys = ("nats", "tokens") if metric in ("nats", "loss", "perplexity") else (metric,)
        kinds |= {key: {int, float, bool} for key in keys}
    for key, kind in kinds.items():
        if not {type(record.get(key)) for record in records} <= kind:
            raise DataError(f"{where}{key} of a record is missing or of another type")


def _examples(scores: dict[str, Any]) -> dict[str, Any]:
    """What was scored: of each set the role, the task, the metrics, and the examples' ids and clusters."""
    return {
        name: [s["role"], s["task"], sorted(s["metrics"]), [(r["id"], r.get("cluster")) for r in s["records"]]]
        for name, s in scores.items()
    }


# -- the results of a comparison --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """The finished runs of one comparison.

    Args:
        results: in the order of the recipe's methods, then by name, learning rate and seed.
        skipped: what could not be used, and why, by path.
        recipe: that was run last.
    """

    results: list[dict[str, Any]]
    skipped: dict[str, str]
    recipe: Recipe


def read_runs(folders: Sequence[Path]) -> Runs:
    """The results of one comparison below some folders, or in them.

    Where runs of several comparisons lie together, those of the comparison with most runs are returned, and of these
    the ones that were scored on the examples that most were scored on. Runs that are there twice (copied folders) count
    once; where they differ, as those of a method of one's own can, the newest counts.

    Raises:
        ConfigError: where a folder does not exist, or no run can be used.
    """
    results: dict[str, dict[str, Any]] = {}  # by folder
    skipped: dict[str, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"no folder at {folder}; give the folder that `smf compare` wrote to (its output)")
        for path in sorted(_result_files(folder)):
            if str(path.parent) not in results:
                try:
                    results[str(path.parent)] = read_result(path)
                except DataError as error:
                    skipped[str(path)] = str(error)
        for inner in sorted(recipe.parent for recipe in folder.glob("*/recipe.toml")):
            if list(inner.glob("*/result.json")):
                skipped[str(inner)] = "it is a folder of runs; give it itself"
            elif not (inner / "result.json").exists():
                skipped[str(inner)] = "it has no result yet; the command that began it goes on with it"
    usable = _once(list(results.values()), skipped)
    other = "it belongs to another comparison: its base, data, training or scored sets differ"
    usable = _most(usable, lambda result: result["comparison"], other, skipped)
    other = "it was scored on other examples, or by other metrics, than most runs"
    usable = _most(usable, lambda result: json_hash(_examples(result["scores"])), other, skipped)
    if not usable:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in skipped.items())
        raise ConfigError(f"no finished run in {', '.join(map(str, folders))}, nor in a folder there{reasons}")
    recipe = _recipe([*folders, *(Path(result["folder"]) for result in usable)], usable[0]["comparison"])
    rank = {name: place for place, name in enumerate(recipe.methods)}
    usable.sort(key=lambda r: (rank.get(r["method"], len(rank)), r["method"], r["options"].get("lr", 0.0), r["seed"]))
    return Runs(usable, skipped, recipe)


def _result_files(folder: Path) -> list[Path]:
    """A run's own folder, or a folder of runs."""
    return [folder / "result.json"] if (folder / "result.json").is_file() else list(folder.glob("*/result.json"))


def _once(results: list[dict[str, Any]], skipped: dict[str, str]) -> list[dict[str, Any]]:
    """Of runs of one method, options and seed, the newest; of equal ones the first."""
    kept: dict[str, dict[str, Any]] = {}
    for result in results:
        key = json_hash([result[part] for part in ("comparison", "method", "options", "seed")])
        before = kept.setdefault(key, result)
        if before is result:
            continue
        if before["scores"] == result["scores"]:
            skipped[result["folder"]] = f"it is the same run as {before['folder']}"
            continue
        newer = max(before, result, key=lambda each: (Path(each["folder"]) / "result.json").stat().st_mtime_ns)
        older = before if newer is result else result
        skipped[older["folder"]] = f"the same method was run again, with other results, in {newer['folder']}"
        kept[key] = newer
    return list(kept.values())


def _most(
    results: list[dict[str, Any]], key: Callable[[dict[str, Any]], str], reason: str, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """The results with the key that most have; the reason why the others are skipped is added."""
    keys = [key(result) for result in results]
    main = Counter(keys).most_common(1)[0][0] if keys else ""
    skipped |= {result["folder"]: reason for result, own in zip(results, keys, strict=True) if own != main}
    return [result for result, own in zip(results, keys, strict=True) if own == main]


def _recipe(folders: Sequence[Path], comparison: str) -> Recipe:
    """The recipe of a comparison that lies beside its runs or in one; else the first that can be read."""
    found, reasons = [], []
    for folder in folders:
        if (folder / "recipe.toml").is_file():
            try:
                found.append(load_recipe(folder / "recipe.toml"))
            except (ConfigError, OSError) as error:  # of another version, or unreadable
                reasons.append(f"\n  {folder}: {error}")
            else:
                if found[-1].comparison_id() == comparison:
                    return found[-1]
    if not found:
        raise ConfigError(f"no recipe.toml that can be read beside or in the runs{''.join(reasons)}")
    return found[0]
