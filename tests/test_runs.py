"""Reading folders of runs: what is whole is read, all else is named with a reason, and nothing stops the report."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import base, curve, recipe, result, scores, write
from smf.errors import ConfigError, DataError
from smf.export import as_csv, as_json
from smf.recipe import MemoryOptions, Method
from smf.recipe_file import to_toml
from smf.report import write_report
from smf.runs import Runs, read_result, read_runs
from smf.summary import summarise
from smf.table import all_tables, markdown

RECIPE = recipe()
HERE = RECIPE.comparison_id()


def named(found: dict[str, Any]) -> dict[str, Any]:
    """Of the comparison that the recipe is of."""
    return found | {"comparison": HERE}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An output folder: the base, LoRA at two rates, smf under two seeds."""
    output = tmp_path / "runs"
    write(output / "base-0", named(base()), RECIPE)
    for number, lr in enumerate((0.2, 0.1)):
        write(output / f"lora-{number}", named(curve("lora", [0.3, 0.5], [1, 0.9], lr=lr, kind="lora")), RECIPE)
    for seed in (1, 0):
        write(output / f"smf-{seed}", named(result("smf", scores(0.5), seed=seed)), RECIPE)
    (output / "recipe.toml").write_text(to_toml(RECIPE))
    return output


def what(found: Runs) -> list[tuple[str, float, int]]:
    return [(r["method"], r["options"]["lr"], r["seed"]) for r in found.results]


ALL = [("base", 0.0, 0), ("lora", 0.1, 0), ("lora", 0.2, 0), ("smf", 0.1, 0), ("smf", 0.1, 1)]


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_results_come_in_the_recipes_order_then_by_rate_and_seed(runs: Path):
    found = read_runs([runs])
    assert what(found) == ALL and found.skipped == {} and found.recipe == RECIPE
    assert [Path(r["folder"]).name for r in found.results] == ["base-0", "lora-1", "lora-0", "smf-0", "smf-1"]
    assert summarise(found.results, RECIPE.target.metrics).base is not None


def test_a_runs_own_folder_and_several_folders_can_be_given(runs: Path, tmp_path: Path):
    assert what(read_runs([runs / "smf-1"])) == [("smf", 0.1, 1)]
    other = tmp_path / "other"
    shutil.move(runs / "lora-0", other / "lora-0")
    assert what(read_runs([runs])) == [row for row in ALL if row[1] != 0.2]
    for folders in ([runs, other], [runs, other / "lora-0"], [other, runs, other, runs, runs / "smf-0"]):
        found = read_runs(folders)
        assert what(found) == ALL and found.skipped == {}


def test_runs_of_before_a_key_was_there_are_of_the_same_method(runs: Path):
    file = runs / "smf-0" / "result.json"
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"options": result["options"] | {"provenance": False}}))
    found = read_runs([runs])
    (row,) = [row for row in summarise(found.results, RECIPE.target.metrics).rows if row.method.startswith("smf")]
    assert row.method == "smf" and row.seeds == (0, 1)


def test_folders_that_hold_no_run_are_named(runs: Path):
    (runs / "notes").mkdir()
    (runs / "gutted").mkdir()
    (runs / "gutted" / "log.txt").write_text("begun")
    (runs / ".cache").mkdir()
    (runs / "healed-1").mkdir()  # a healed memory, which methods share
    (runs / "smf-0" / "adapter").mkdir()
    found = read_runs([runs])
    assert what(found) == ALL
    assert found.skipped == {str(runs / name): "it holds no run" for name in ("notes", "gutted")}
    assert read_runs([runs / "smf-0"]).skipped == {}


@pytest.mark.parametrize("odd", [["a"], {"a": 1}, 3, None])
def test_whatever_a_commit_is_said_to_be_breaks_no_table(runs: Path, odd: object):
    file = runs / "smf-0" / "result.json"
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"provenance": result.get("provenance", {}) | {"git": odd}}))
    found = read_runs([runs])
    assert markdown(summarise(found.results, RECIPE.target.metrics)) and what(found) == ALL


def test_a_run_more_changes_no_other(runs: Path):
    before = read_runs([runs]).results
    write(runs / "smf-9", named(result("smf", scores(0.6), seed=9)), RECIPE)
    after = read_runs([runs]).results
    assert after[:5] == before and len(after) == 6


def test_a_method_that_the_recipe_no_longer_has_comes_last(runs: Path):
    write(runs / "gone", named(result("a-former-one")), RECIPE)
    assert what(read_runs([runs])) == [*ALL, ("a-former-one", 0.1, 0)]


def test_nulls_and_not_a_number_are_read(runs: Path):
    """A healed memory does not say how many rows changed; training that diverged leaves NaN."""
    made = named(result("smf", scores(0.5), seed=5)) | {"rows_changed": None, "new": "key"}
    made["scores"]["held-out"]["metrics"]["loss"] = math.nan
    made["scores"]["held-out"]["records"][7]["nats"] = math.nan
    write(runs / "smf-5", made, RECIPE)
    found = read_runs([runs])
    assert what(found) == [*ALL, ("smf", 0.1, 5)]
    tables = all_tables(summarise(found.results, ["acc"]))
    assert tables[""][0][1][-1][-4] == "-"


# -- folders that are none --------------------------------------------------------------------------------------------


def test_a_missing_or_empty_folder_is_an_error_that_says_what_to_give(tmp_path: Path):
    with pytest.raises(ConfigError, match="no folder at"):
        read_runs([tmp_path / "none"])
    with pytest.raises(ConfigError, match="no finished run in"):
        read_runs([tmp_path])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no folder at"):
        read_runs([tmp_path / "file"])


def test_a_folder_of_folders_of_runs_says_so(runs: Path):
    with pytest.raises(ConfigError, match="it is a folder of runs; give it itself"):
        read_runs([runs.parent])


def test_unfinished_runs_are_named(runs: Path):
    (runs / "smf-7").mkdir()
    (runs / "smf-7" / "recipe.toml").write_text(to_toml(RECIPE))
    (runs / "healed-0").mkdir()
    found = read_runs([runs])
    assert what(found) == ALL
    (reason,) = found.skipped.values()
    assert reason.startswith("it has no result yet; the command that began it goes on with it")
    assert str(runs / "smf-7" / "log.txt") in reason


# -- files that are none ----------------------------------------------------------------------------------------------


def broken() -> dict[str, str | bytes]:
    """Contents of result.json that are not JSON, or no result of this version, by why."""
    whole = json.dumps(named(result("smf", scores(0.5), seed=5)))
    return {
        "cannot be read as JSON: Expecting value": "",
        "cannot be read as JSON": whole[: len(whole) // 2],
        "Extra data": whole + whole,
        "codec can't decode": b"\xff\xfe\x00\x01" + whole.encode(),
        "recursion": "[" * 100_000,
        "format is list": "[]",
        "format is NoneType": "null",
        "format is None;": whole.replace('"format"', '"fromat"'),
        "format is 0;": whole.replace('"format": 1', '"format": 0'),
        "this version reads 1": whole.replace('"format": 1', '"format": "1"'),
    }


@pytest.mark.parametrize("reason", broken())
def test_a_broken_file_is_named_with_its_reason_and_the_others_are_read(runs: Path, reason: str):
    write(runs / "smf-5", broken()[reason], RECIPE)
    found = read_runs([runs])
    assert what(found) == ALL and list(found.skipped) == [str(runs / "smf-5" / "result.json")]
    assert reason.lower() in next(iter(found.skipped.values())).lower()


def wrong(path: str, value: Any) -> dict[str, Any]:
    """A result in which one thing is another; `value` ... takes it away."""
    return put(whole(), [int(key) if key.isdigit() else key for key in path.split("/")], value)


def whole() -> dict[str, Any]:
    """A result that has whatever a result may have."""
    made = named(curve("smf", [0.3, 0.5], [1, 0.9], seed=5, memory=asdict(MemoryOptions()), rows_per_step=64))
    return made | {"rows_by_layer": {"a": 2, "b": 1}}


def put(made: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    inner: Any = made
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made


WRONG = [
    ("method", ..., "method is missing or no str"),
    ("kind", 3, "kind is missing or no str"),
    ("seed", "0", "seed is missing or no int"),
    ("seed", True, "seed is missing or no int"),
    ("steps", None, "steps is missing or no int"),
    ("options", [], "options is missing or no dict"),
    ("options/lr", "fast", "options.lr is missing or no number"),
    ("options/lr", None, "options.lr is missing or no number"),
    ("options/lr", math.nan, "options: lr = nan; expected a finite number"),
    ("options/lr", 10**400, "options.lr is beyond 1e+100"),
    ("options/alpha", 10**400, "too large to convert to float"),
    ("options/rows_per_step", "abc", "options.rows_per_step is missing or no number"),
    ("options/rows_per_step", 0, "options: rows_per_step = 0; expected a finite number of at least 1"),
    ("options/layers", "abc", "options: layers must be a list; got 'abc'"),
    ("options/layers", ["2"], "options: layers = '2'; expected int"),
    ("options/memory/n_keys", "many", "n_keys = 'many'; expected int"),
    ("options/rwos_per_step", 9, "unknown key 'rwos_per_step'; did you mean 'rows_per_step'"),
    ("comparison", ..., "comparison is missing"),
    ("scores", ..., "scores is missing or no dict"),
    ("scores", [], "scores is missing or no dict"),
    ("seconds", "long", "seconds is missing or no number"),
    ("rows_by_layer", [1], "rows_by_layer is missing or no dict"),
    ("rows_by_layer/a", "x", "rows_by_layer.a is missing or no number"),
    ("rows_by_layer/a", 10**400, "rows_by_layer.a is beyond 1e+100"),
    ("seconds", 10**400, "seconds is beyond 1e+100"),
    ("provenance", "a laptop", "provenance is missing or no dict"),
    ("provenance/machine", "a laptop", "machine.jobs is missing"),
    ("provenance/machine/jobs", None, "machine.jobs is missing or no int"),
    ("on_the_way", {"0.5": {}}, "on_the_way is missing or no list"),
    ("on_the_way", None, "on_the_way is missing or no list"),
    ("on_the_way/0", "half", "step is missing"),
    ("on_the_way/0/share", ..., "share is missing or no number"),
    ("on_the_way/0/share", 1, "share of 1; expected one between 0 and 1"),
    ("on_the_way/0/share", math.nan, "share of nan; expected one between 0 and 1"),
    ("on_the_way/0/more", 1, "on_the_way has the keys"),
    ("on_the_way/0/scores", None, "scores is missing or no dict"),
    ("on_the_way/0/scores/near-domain", ..., "or by other metrics, than at its end"),
    ("on_the_way/0/scores/near-domain/records", [], "near-domain: records are missing"),
    ("scores/held-out", 0.5, "scores.held-out: role is missing"),
    ("scores/held-out/role", "goal", "role 'goal' and task 'choices' are not known"),
    ("scores/held-out/task", "poetry", "role 'target' and task 'poetry' are not known"),
    ("scores/held-out/metrics", 0.5, "metrics is missing or no dict"),
    ("scores/held-out/metrics/acc", ..., "scores.held-out: metrics.acc is missing"),
    ("scores/held-out/metrics/acc", "0.5", "scores.held-out: metrics.acc is missing or no number"),
    ("scores/general-text/metrics/perplexity", None, "metrics.perplexity is missing or no number"),
    ("scores/held-out/metrics/acc", 0.51, "metrics.acc is 0.51, but the records give 0.5"),
    ("scores/held-out/metrics/acc", math.nan, "metrics.acc is nan, but the records give 0.5"),
    ("scores/held-out/metrics/acc", 10**400, "metrics.acc is 10000000000000000000, but the records give 0.5"),
    ("scores/held-out/metrics/loss", 2, "metrics.loss is 2, but the records give 1"),
    ("scores/general-text/metrics/perplexity", 9.0, "metrics.perplexity is 9.0, but the records give 8.16617"),
    ("scores/KL general-text/metrics/nats", 0.0, "metrics.nats is 0.0, but the records give 0.1"),
    ("on_the_way/0/scores/near-domain/metrics/acc", 0.5, "near-domain: metrics.acc is 0.5, but the records give 1"),
    ("scores/held-out/records", "many", "records is missing or no list"),
    ("scores/held-out/records/0", "one", "records are missing or no tables"),
    ("scores/held-out/records/0/id", ..., "id of a record is missing"),
    ("scores/held-out/records/0/id", ["a"], "id of a record is missing or of another type"),
    ("scores/held-out/records/0/cluster", {}, "cluster of a record"),
    ("scores/held-out/records/3/acc", "1", "acc of a record is missing or of another type"),
    ("scores/held-out/records/3/nats", ..., "nats of a record"),
    ("scores/held-out/records/3/acc", 10**400, "acc of a record is beyond 1e+100"),
    ("scores/held-out/records/3/nats", -1e300, "nats of a record is beyond 1e+100"),
    ("scores/KL general-text/records/0/tokens", None, "tokens of a record"),
    ("scores/KL general-text/records/11/tokens", math.nan, "KL general-text: tokens of a record is no finite number"),
    ("scores/KL general-text/records/11/tokens", math.inf, "tokens of a record is no finite number"),
    ("scores/KL general-text/records/11/tokens", -1, "tokens of a record is no finite number of at least 0"),
]


@pytest.mark.parametrize(("path", "value", "reason"), WRONG)
def test_a_wrong_type_inside_is_named(tmp_path: Path, path: str, value: Any, reason: str):
    folder = write(tmp_path / "smf-5", wrong(path, value))
    with pytest.raises(DataError) as error:
        read_result(folder / "result.json")
    assert reason in str(error.value)


def places(inner: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a result, at any depth; of lists, to the first and the last."""
    keys = list(inner) if isinstance(inner, dict) else sorted({0, len(inner) - 1}) if isinstance(inner, list) else []
    for key in keys if inner else []:
        yield (*path, key)
        yield from places(inner[key], (*path, key))


JUNK = [..., None, 0, -1, 1.5, "", "0", "abc", [], {}, [1], ["a"], {"a": 1}, {"2": "x"}, True, math.nan, math.inf]
JUNK += [10**19, 10**400, -(10**400), 1e308, 5e-324]
PLACES = list(places(whole()))


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted({len(path) for path in PLACES})), st.data())
def test_whatever_is_wrong_a_report_can_be_made_or_the_run_is_named(tmp_path: Path, depth: int, data: st.DataObject):
    """Any place of a result replaced by anything, or taken away; one depth as often as another."""
    path = data.draw(st.sampled_from([path for path in PLACES if len(path) == depth]))
    made = put(whole(), list(path), data.draw(st.sampled_from(JUNK)))
    output = tmp_path / "any"
    write(output / "base-0", named(base()), RECIPE)
    write(output / "smf-4", named(result("smf-more", memory=asdict(MemoryOptions()), rows_per_step=128)), RECIPE)
    write(output / "smf-5", made, RECIPE)
    found = read_runs([output])
    assert len(found.results) + len(found.skipped) == 3
    if found.skipped:
        return
    summary = summarise(found.results, RECIPE.target.metrics)
    all_tables(summary)
    as_csv(summary)
    json.dumps(as_json(summary), allow_nan=False)
    write_report(summary, output / "report.html", "any")


def test_a_result_that_is_a_folder_is_named(runs: Path):
    (runs / "smf-5" / "result.json").mkdir(parents=True)
    found = read_runs([runs])
    assert what(found) == ALL and list(found.skipped) == [str(runs / "smf-5" / "result.json")]


def test_where_nothing_can_be_used_every_reason_is_given(tmp_path: Path):
    write(tmp_path / "a", "{")
    write(tmp_path / "b", {"format": 7})
    with pytest.raises(ConfigError, match=r"(?s)a/result.json: it cannot be read.*b/result.json: its format is 7"):
        read_runs([tmp_path])


# -- runs that do not belong ------------------------------------------------------------------------------------------


def test_runs_of_another_comparison_are_named(runs: Path):
    write(runs / "other", result("smf") | {"comparison": "elsewhere"}, RECIPE)
    found = read_runs([runs])
    assert what(found) == ALL and "another comparison" in found.skipped[str(runs / "other")]


def test_runs_that_were_scored_on_other_examples_are_named(runs: Path):
    """The file of a probe was another one on that day, or another version scored fewer sets."""
    changed = named(result("smf", scores(0.5), seed=5))
    changed["scores"]["near-domain"]["records"][0]["id"] = "another"
    fewer = named(result("smf", scores(0.5), seed=6))
    del fewer["scores"]["KL general-text"]
    older = named(result("smf", scores(0.5), seed=7))
    del older["scores"]["held-out"]["metrics"]["answer_norm"]
    for seed, made in ((5, changed), (6, fewer), (7, older)):
        write(runs / f"smf-{seed}", made, RECIPE)
    found = read_runs([runs])
    assert what(found) == ALL
    assert found.skipped == dict.fromkeys(
        [str(runs / f"smf-{seed}") for seed in (5, 6, 7)],
        "it was scored on other examples, or by other metrics, than most runs",
    )


@pytest.mark.parametrize("how", ["copy", "renamed", "copy elsewhere", "link"])
def test_a_run_that_is_there_twice_counts_once(runs: Path, tmp_path: Path, how: str):
    to = {"copy": runs / "smf-0 (copy)", "renamed": runs / "zzz", "copy elsewhere": tmp_path / "b" / "smf-0"}
    if how == "link":
        (runs / "smf-zero").symlink_to(runs / "smf-0")
    else:
        shutil.copytree(runs / "smf-0", to[how])
    found = read_runs([runs, *([tmp_path / "b"] if how == "copy elsewhere" else [])])
    assert what(found) == ALL and list(found.skipped.values()) == [f"it is the same run as {runs / 'smf-0'}"]
    summarise(found.results, RECIPE.target.metrics)


@pytest.mark.parametrize("newer", ["old-name", "new-name"])
def test_of_two_different_results_of_one_run_the_newest_counts(runs: Path, newer: str):
    """A method of one's own changed: its module's hash is in the folder's name, and in nothing else."""
    for number, name in enumerate(("old-name", "new-name")):
        folder = write(runs / name, named(result("smf", scores(0.3 + number / 10), seed=5)), RECIPE)
        os.utime(folder / "result.json", (10**9, 10**9 + (name == newer)))
    found = read_runs([runs])
    assert Path(found.results[-1]["folder"]).name == newer and len(found.results) == 6
    (older,) = found.skipped
    assert Path(older).name != newer and "run again, with other results" in found.skipped[older]


def test_links_that_lead_nowhere_or_in_circles_do_not_matter(runs: Path):
    (runs / "nowhere").symlink_to(runs / "gone")
    (runs / "circle").symlink_to(runs / "circle")
    (runs / "up").symlink_to(runs)
    (runs / "smf-4").mkdir()
    (runs / "smf-4" / "result.json").symlink_to(runs / "gone.json")
    found = read_runs([runs])
    assert what(found) == ALL and set(found.skipped) <= {str(runs / "up"), str(runs / "smf-4")}


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_without_a_recipe_beside_the_runs_a_runs_own_is_read(runs: Path):
    (runs / "recipe.toml").unlink()
    assert read_runs([runs]).recipe == RECIPE


def test_the_recipe_of_the_runs_is_read_and_not_one_that_was_put_there_later(runs: Path):
    later = replace(RECIPE, base="another", methods={"z": Method(kind="lora", lr=1.0)})
    (runs / "recipe.toml").write_text(to_toml(later))
    found = read_runs([runs])
    assert found.recipe == RECIPE and what(found) == ALL


@pytest.mark.parametrize("content", [b'[methods.x]\nkind = "smf"\nunknown_key = 1\n', b"not toml =", b"\xff\xfe", b""])
def test_a_recipe_of_another_version_gives_way_to_one_that_can_be_read(runs: Path, content: bytes):
    (runs / "recipe.toml").write_bytes(content)
    assert read_runs([runs]).recipe == RECIPE


def test_without_any_recipe_that_can_be_read_it_is_said_why(runs: Path):
    for file in runs.glob("**/recipe.toml"):
        file.write_text("unknown = 1")
    with pytest.raises(ConfigError, match=r"(?s)no recipe.toml that can be read.*unknown key 'unknown'"):
        read_runs([runs])
    for file in runs.glob("**/recipe.toml"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"no recipe\.toml that can be read"):
        read_runs([runs])


def test_a_recipe_whose_hash_changed_is_better_than_none(runs: Path):
    """As when a new version has a key more."""
    for folder in runs.iterdir():
        if folder.is_dir():
            made = json.loads((folder / "result.json").read_text()) | {"comparison": "of an older version"}
            (folder / "result.json").write_text(json.dumps(made))
    assert read_runs([runs]).recipe == RECIPE
