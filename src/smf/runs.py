"""Reading the folders that runs left: which results there are, and which cannot be used and why."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, DataError
from .evaluate import mean_of
from .files import no_folder, read_text
from .fingerprint import json_hash
from .recipe import LATER, Method, Recipe
from .recipe_file import build, check_numbers, load_recipe
from .tasks import TASKS, find_task
from .tasks.harness_task import PREFIX

FORMAT = 1  # of result.json
ADDED = {key.name: LATER[key.name] for key in dataclasses.fields(Method) if key.name in LATER}  # keys of methods since
ROLES = ("target", "probe", "validation", "divergence")
LARGEST = 1e100  # finite numbers that are larger are no measurement; sums and drawings of them overflow
NUMBER = (int, float)
Kinds = dict[str, type | tuple[type, ...]]
NEEDED: Kinds = {"method": str, "kind": str, "seed": int, "steps": int, "options": dict, "comparison": str}
OPTIONAL: Kinds = {"on_the_way": list, "provenance": dict, "rows_by_layer": dict, "code": str}
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
        result = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"it cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        found = result.get("format") if isinstance(result, dict) else type(result).__name__
        raise DataError(f"its format is {found}; this version reads {FORMAT}")
    _expect(result, NEEDED, "")
    _expect(result, {key: kind for key, kind in OPTIONAL.items() if key in result}, "")
    _expect(result, {key: NUMBER for key in COSTS if result.get(key) is not None}, "")
    _check_options(result["options"])
    by_layer = result.get("rows_by_layer", {})
    _expect(by_layer, dict.fromkeys(by_layer, NUMBER), "rows_by_layer.")
    machine = result.get("provenance", {}).get("machine", {})
    _expect({"jobs": 1} | machine if isinstance(machine, dict) else machine, {"jobs": int}, "provenance.machine.")
    _check_moments(result)
    return result | {"folder": str(path.parent), "options": ADDED | result["options"]}


def _expect(table: Any, keys: Kinds, where: str) -> None:
    for key, kind in keys.items():
        value = table.get(key) if isinstance(table, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            name = "number" if kind == NUMBER else getattr(kind, "__name__", "")
            raise DataError(f"{where}{key} is missing or no {name}")
        if isinstance(value, NUMBER) and not is_number(value):
            raise DataError(f"{where}{key} is beyond {LARGEST:g}, which is no measurement")


def is_number(value: Any) -> bool:
    """Whether it can be added up and drawn, but for NaN and infinity, which training that diverged leaves."""
    return isinstance(value, NUMBER) and not isinstance(value, bool) and not LARGEST < abs(value) < math.inf


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what is no [methods.NAME] table; a key that is null there is one that the recipe left out."""
    _expect(options, {key: NUMBER for key in ("lr", "rows_per_step") if key in options}, "options.")
    try:
        method = build(Method, _without_null(options), "options")
        check_numbers(dataclasses.asdict(method), "options")
    except (ConfigError, OverflowError, RecursionError) as error:
        raise DataError(str(error)) from error


def _without_null(table: dict[str, Any]) -> dict[str, Any]:
    plain = {key: _without_null(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in plain.items() if value is not None or key not in ("layers", "memory")}


def _check_moments(result: dict[str, Any]) -> None:
    """Refuse scores that cannot be compared, at the end or on the way to it."""
    end = {"step": result["steps"], "share": 1.0, "scores": result.get("scores")}
    moments = [*result.get("on_the_way", []), end]
    for moment in moments:
        _expect(moment, MOMENT, "")
        if set(moment) != set(MOMENT):
            raise DataError(f"on_the_way has the keys {sorted(moment)}; expected {sorted(MOMENT)}")
        if not 0 < moment["share"] < 1 and moment is not end:
            raise DataError(f"on_the_way has a share of {moment['share']}; expected one between 0 and 1")
        for name, score in moment["scores"].items():
            _check_score(score, f"scores.{name}: ")
    scored = [_examples(moment["scores"]) for moment in moments]
    if any(examples != scored[-1] for examples in scored):
        raise DataError("on its way it was scored on other examples, or by other metrics, than at its end")


def _check_score(score: Any, where: str) -> None:
    """Refuse a score that cannot be compared; numbers may be NaN, which training that diverged leaves."""
    _expect(score, SCORE, where)
    role, task, metrics, records = (score[key] for key in SCORE)
    if role not in ROLES or (role != "divergence" and not _known(task)):
        raise DataError(f"{where}role {role!r} and task {task!r} are not known to this version")
    known = ("nats",) if role == "divergence" else find_task(task).METRICS
    needed = known if "perplexity" in known else known[:1]  # what tables cannot do without
    for metric in [*needed, *metrics]:
        if not isinstance(metrics.get(metric), NUMBER) or isinstance(metrics[metric], bool):
            raise DataError(f"{where}metrics.{metric} is missing or no number")
    if not all(isinstance(record, dict) for record in records) or not (records or role == "validation"):
        raise DataError(f"{where}records are missing or no tables")
    measured = [metric for metric in known if metric in metrics and metric != "word_perplexity"]  # of pages, no records
    _check_records(records, measured, where)
    for metric in measured if records else []:
        mean = mean_of(records, metric)
        if not _agree(metrics[metric], mean):
            raise DataError(f"{where}metrics.{metric} is {metrics[metric]!r:.20}, but the records give {mean:.6g}")


def _check_records(records: list[dict[str, Any]], metrics: Sequence[str], where: str) -> None:
    """Every example has a name and the numbers that the metrics are means of."""
    kinds: dict[str, set[type]] = {"id": {str, int}, "cluster": {str, int, type(None)}}
    for metric in metrics:
        keys = ("nats", "tokens") if metric in ("nats", "loss", "perplexity") else (metric,)
        kinds |= {key: {int, float, bool} for key in keys}
    for key, kind in kinds.items():
        if not {type(record.get(key)) for record in records} <= kind:
            raise DataError(f"{where}{key} of a record is missing or of another type")
        if float in kind and not all(is_number(record[key] + 0) for record in records):  # + 0: of True, 1
            raise DataError(f"{where}{key} of a record is beyond {LARGEST:g}, which is no measurement")
        if key == "tokens" and not all(0 <= record[key] < math.inf for record in records):  # a count, never of training
            raise DataError(f"{where}tokens of a record is no finite number of at least 0")


def _agree(stated: float, found: float) -> bool:
    """Equal but for the rounding of sums; as comparisons, which a stated number of any size allows."""
    if math.isnan(found) or math.isinf(found):
        return stated == found or (stated != stated and found != found)
    room = 1e-6 * abs(found) + 1e-12
    return found - room <= stated <= found + room


def _known(task: str) -> bool:
    return task in TASKS or task.startswith(PREFIX)


def _examples(scores: dict[str, Any]) -> dict[str, Any]:
    """What was scored: of each set the role, the task, the metrics, and the examples' ids and clusters."""
    return {
        name: [s["role"], s["task"], sorted(s["metrics"]), [(r["id"], r.get("cluster")) for r in s["records"]]]
        for name, s in scores.items()
    }


def is_finished(path: Path) -> bool:
    """Whether a run has its result at `path`; one that cannot be read is set aside, said, and to be made again."""
    if path.is_file():
        try:
            read_result(path)
        except DataError as error:
            aside = path.with_name("result.broken.json")
            with contextlib.suppress(FileNotFoundError):  # another rank was first
                path.replace(aside)
            print(f"smf: {path}: {error}; it is now {aside.name}, and the run is done again", file=sys.stderr)
    return path.is_file()


# -- the results of a comparison --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """The finished runs of one comparison.

    Args:
        results: in the order of the recipe's methods, then by name, learning rate and seed.
        skipped: what could not be used, and why, by path.
        recipe: that was run last, or that was asked for.
        failed: method, options, seed, comparison and reason of each run whose training failed.
    """

    results: list[dict[str, Any]]
    skipped: dict[str, str]
    recipe: Recipe
    failed: list[dict[str, Any]]


FAILED = "failed.json"  # in the folder of a run whose training failed
FAILURE: Kinds = {"method": str, "options": dict, "seed": int, "comparison": str, "reason": str}


def read_runs(folders: Sequence[Path], recipe: Recipe | None = None) -> Runs:
    """The results of one comparison below some folders, or in them.

    Where runs of several comparisons lie together, those of the comparison with most runs are returned, and of these
    the ones that were scored on the examples that most were scored on. Runs that are there twice (copied folders) count
    once; where they differ, as those of a method of one's own can, the newest counts.

    Args:
        folders: of runs, or of one run each.
        recipe: whose runs to read, in place of those of the comparison with most: its methods as they are now, at
            whatever learning rate and seed. Other runs are not named in `skipped`.

    Raises:
        ConfigError: where a folder does not exist, or no run can be used.
    """
    found, failures, skipped = _read(folders)
    if recipe is None:
        usable = _once(list(found.values()), skipped)
        other = "it belongs to another comparison: its base, data, training or scored sets differ"
        usable = _most(usable, lambda result: result["comparison"], other, skipped)
    else:
        skipped.clear()
        usable = [result for folder, result in found.items() if _is_of(recipe, result, folder)]
        failures = {folder: run for folder, run in failures.items() if _is_of(recipe, run, folder)}
    other = "it was scored on other examples, or by other metrics, than most runs"
    usable = _most(usable, lambda result: json_hash(_examples(result["scores"])), other, skipped)
    if not usable:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in skipped.items())
        raise ConfigError(f"no finished run in {', '.join(map(str, folders))}, nor in a folder there{reasons}")
    comparison = usable[0]["comparison"]
    recipe = recipe or _recipe([*folders, *(Path(result["folder"]) for result in usable)], comparison)
    failed = _failed(failures, comparison, usable)
    for folder, run in failures.items():
        if any(_key(run) == _key(each) for each in failed):
            skipped.pop(folder, None)  # it is told with the failed ones
    return Runs(_in_order(usable, recipe), skipped, recipe, _in_order(failed, recipe))


def _in_order(runs: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    rank = {name: place for place, name in enumerate(recipe.methods)}
    return sorted(
        runs, key=lambda r: (rank.get(r["method"], len(rank)), r["method"], r["options"].get("lr", 0.0), r["seed"])
    )


def _read(folders: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], dict[str, str]]:
    """By their folders all results and all runs whose training failed; by path why others cannot be used."""
    results: dict[str, dict[str, Any]] = {}
    failures: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{no_folder(folder)}; give the folder that `smf compare` wrote to (its output)")
        for path in sorted(_result_files(folder)):
            if str(path.parent) not in results:
                try:
                    results[str(path.parent)] = read_result(path)
                except DataError as error:
                    skipped[str(path)] = str(error)
        for inner in sorted(recipe.parent for recipe in folder.glob("*/recipe.toml")):
            if list(inner.glob("*/result.json")):
                skipped[str(inner)] = "it is a folder of runs; give it itself"
            elif (failure := failure_of(inner)) is not None:
                failures[str(inner)] = failure
                skipped[str(inner)] = f"its training failed: {failure['reason']}"
            elif not (inner / "result.json").exists():
                reason = "it has no result yet; the command that began it goes on with it (what it printed"
                skipped[str(inner)] = f"{reason}: {inner / 'log.txt'})"
        if not (folder / "result.json").is_file():
            skipped |= {str(inner): "it holds no run" for inner in folder.iterdir() if _is_foreign(inner)}
    return results, failures, skipped


def _is_foreign(folder: Path) -> bool:
    """A folder that is no run, no folder of runs, and nothing else that a comparison makes."""
    if not folder.is_dir() or folder.name.startswith((".", "healed-")):  # healed: a memory that methods share
        return False
    made = [folder / name for name in ("recipe.toml", "result.json")]
    return not any(file.exists() for file in made) and not list(folder.glob("*/result.json"))


def _result_files(folder: Path) -> list[Path]:
    """A run's own folder, or a folder of runs."""
    return [folder / "result.json"] if (folder / "result.json").is_file() else list(folder.glob("*/result.json"))


def failure_of(folder: Path) -> dict[str, Any] | None:
    """What a run left whose training failed; None where there is nothing that can be read, or a later try succeeded."""
    if (folder / "result.json").exists():
        return None
    try:
        failure = json.loads(read_text(folder / FAILED))
        _expect(failure, FAILURE, "")
        _expect(failure["options"], {"lr": NUMBER}, "options.")
    except (OSError, ValueError, RecursionError):  # ValueError: DataError too
        return None
    return {key: failure[key] for key in FAILURE} | {"code": failure.get("code")}


def _failed(
    failures: dict[str, dict[str, Any]], comparison: str, usable: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The failures of a comparison, each once; what has a result elsewhere has not failed."""
    own = {_key(run): run for run in failures.values() if run["comparison"] == comparison}
    finished = {_key(result) for result in usable}
    return [run for key, run in own.items() if key not in finished]


def _key(run: dict[str, Any]) -> str:
    """Of runs that differ in nothing but their folders."""
    return json_hash([run.get(part) for part in ("comparison", "method", "options", "seed", "code")])


def _is_of(recipe: Recipe, run: dict[str, Any], folder: str) -> bool:
    """Whether a folder is named as the recipe names a run of this method at this rate and seed.

    Then the method is the one that the recipe has now: a folder's name changes with every option, and with the code of
    a method of one's own.
    """
    name = run["method"]
    if name not in recipe.methods:
        return False
    method = replace(recipe.methods[name], lr=run["options"].get("lr", 0.0))
    return replace(recipe, seed=run["seed"], methods={name: method}).run_id(name) == Path(folder).name


def _once(results: list[dict[str, Any]], skipped: dict[str, str]) -> list[dict[str, Any]]:
    """Of runs of one method, options and seed, the newest; of equal ones the first."""
    kept: dict[str, dict[str, Any]] = {}
    for result in results:
        key = _key(result)
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
