"""`smf doctor` says what is wrong with runs and what to do, reads only, and breaks at nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smf import cli, doctor
from smf.checkpoints import MANIFEST
from smf.compare import result_path
from smf.doctor import _within, environment, unmet
from smf.doctor_cli import examine
from smf.errors import ConfigError, SmfError
from smf.faults import explained
from smf.health import Health, look_at
from smf.locks import LOCK, working_in
from smf.recipe import Recipe
from smf.recipe_file import load_recipe
from smf.runs import read_runs
from smf.train import run_method
from test_fuzz import BYTES, edited, with_junk, within
from tiny import make_world


class CutError(Exception):
    pass


def cut(*_: object) -> None:
    raise CutError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A folder with a finished run of smf, one of LoRA that stopped after its checkpoints, and a finished base."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = load_recipe(make_world(folder))
    run_method(recipe, "base")
    run_method(recipe, "smf")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("smf.train._score", cut)
        with pytest.raises(CutError):
            run_method(recipe, "lora")
    return recipe, Path(recipe.output)


@pytest.fixture
def copy(runs: tuple[Recipe, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A run of a copy of that folder, by its method."""
    shutil.copytree(runs[1], tmp_path / "runs")
    return lambda name: tmp_path / "runs" / result_path(runs[0], name).parent.name


def state_of(folder: Path) -> dict[str, str]:
    """Every file of a folder with its content's hash and its times of change."""
    return {
        str(path): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in folder.rglob("*")
        if path.is_file()
    }


def seen(folder: Path) -> Health:
    (health,) = look_at(folder)
    return health


def said(health: Health, *, act: bool) -> list[str]:
    return [f"{finding.what} -> {finding.do}" for finding in health.findings if finding.act is act]


def test_runs_are_told_with_what_they_could_go_on_from_and_nothing_is_changed(copy: Callable[[str], Path]):
    before = state_of(copy("base").parent)
    found = {health.folder: health for health in look_at(copy("base").parent)}
    assert state_of(copy("base").parent) == before
    base, smf, lora = (found[str(copy(name))] for name in ("base", "smf", "lora"))
    assert len(found) == 3 and (base.state, smf.state, lora.state) == ("finished", "finished", "unfinished")
    assert base.findings == smf.findings == [] and lora.newest == 4 and lora.damaged == {}
    assert smf.bytes == sum(path.stat().st_size for path in copy("smf").rglob("*") if path.is_file())
    (line,) = said(lora, act=True)
    assert "unfinished, with a checkpoint of step 4, and nobody works in it -> smf train" in line


def test_the_command_that_is_said_finishes_the_run(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    folder = copy("lora")
    command = seen(folder).findings[-1].do
    words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", words)
    assert words[:2] == ["smf", "train"]
    cli.main()
    assert seen(folder).state == "finished" and "resuming from" not in command
    assert said(seen(folder), act=True) == []


def test_damaged_checkpoints_are_named_and_the_newest_good_one_is_found(copy: Callable[[str], Path]):
    folder = copy("lora") / "checkpoints"
    weights = folder / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    health = seen(copy("lora"))
    assert health.newest == 2 and health.damaged == {
        "checkpoint-4": "adapter_model.safetensors is not what was written"
    }
    (folder / "checkpoint-2" / MANIFEST).unlink()
    health = seen(copy("lora"))
    assert health.newest is None and health.damaged["checkpoint-2"] == "it was not written to its end"
    assert "unfinished, without a checkpoint" in said(health, act=True)[0]


def test_locks_say_whether_their_holder_lives(copy: Callable[[str], Path]):
    folder = copy("lora")
    (folder / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    health = seen(folder)  # as of a process that was killed, whose number another one has now
    assert health.state == "unfinished" and "ended before its work was done" in said(health, act=False)[0]
    with working_in(folder, wait=False):
        health = seen(folder)
        me = f"process {os.getpid()} on {socket.gethostname()}"
        assert health.state == "running" and health.holder == me and said(health, act=True) == []
    assert said(seen(folder), act=False) == []


def broken_result(folder: Path) -> None:
    (folder / "result.json").write_text("{")


def broken_patch(folder: Path) -> None:
    content = bytearray((folder / "patch.smf").read_bytes())
    content[-3] ^= 1
    (folder / "patch.smf").write_bytes(content)


def no_patch(folder: Path) -> None:
    (folder / "patch.smf").unlink()


def cut_adapter(folder: Path) -> None:
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (broken_result, "it cannot be used: it cannot be read as JSON"),
        (broken_patch, "was altered"),
        (no_patch, "no patch file at"),
        (cut_adapter, "it is not whole"),
    ],
)
def test_what_is_broken_is_named_and_the_command_mends_it(
    copy: Callable[[str], Path], damage: Callable[[Path], None], what: str, monkeypatch: pytest.MonkeyPatch
):
    folder = copy("smf")
    damage(folder)
    health = seen(folder)
    (line,) = said(health, act=True)
    assert health.state == "broken" and what in line
    command = health.findings[0].do.removeprefix(f"rm {shlex.quote(str(folder / 'result.json'))} && ")
    if command != health.findings[0].do:
        (folder / "result.json").unlink()
    monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
    cli.main()
    assert said(seen(folder), act=True) == [] and seen(folder).state == "finished"


@pytest.mark.parametrize("name", [LOCK, "metrics.jsonl", "skipped.json", "checkpoints", "scores", "hidden-states"])
def test_a_file_for_a_folder_and_a_folder_for_a_file_are_told(
    copy: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
):
    path = copy("lora") / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.touch() if name in ("checkpoints", "scores", "hidden-states") else path.mkdir()
    health = seen(path.parent)
    finding = next(each for each in health.findings if each.where == str(path))
    assert health.state in ("broken", "unfinished") and finding.act and finding.what.startswith("it is no ")
    subprocess.run(shlex.split(finding.do), check=True)
    monkeypatch.setattr(sys, "argv", shlex.split(seen(path.parent).findings[-1].do))
    cli.main()
    assert said(seen(path.parent), act=True) == []


def test_a_folder_of_comparisons_is_told_as_that(runs: tuple[Recipe, Path], tmp_path: Path):
    recipe, _ = runs
    shutil.copytree(recipe.output, tmp_path / "demo")
    with pytest.raises(ConfigError, match=f"no run in {tmp_path}, but folders of runs: give {tmp_path / 'demo'}"):
        look_at(tmp_path)
    assert look_at(tmp_path / "demo")


def test_a_finished_run_with_a_file_for_a_folder_is_broken(copy: Callable[[str], Path]):
    folder = copy("smf")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "checkpoints").touch()
    (folder / LOCK).unlink(missing_ok=True)
    (folder / LOCK).symlink_to(folder / "result.json")  # whose target a start would not touch
    health = seen(folder)
    assert health.state == "broken" and sum("it is no" in line for line in said(health, act=True)) == 2


def test_a_link_beside_a_run_that_is_to_go_on_is_told(runs: tuple[Recipe, Path], tmp_path: Path):
    """And a copy that somebody keeps in a run's folder makes no folder of runs of it."""
    recipe, _ = runs
    folder = shutil.copytree(result_path(recipe, "smf").parent, tmp_path / result_path(recipe, "smf").parent.name)
    shutil.copytree(folder, folder / "backup")
    (folder / "model").symlink_to(tmp_path)
    (health,) = look_at(tmp_path)
    assert health.state == "finished" and not any("link" in line for line in said(health, act=True))
    (folder / "result.json").unlink()
    (health,) = look_at(tmp_path)
    assert health.state == "broken" and any("it is a link" in line for line in said(health, act=True))


def test_a_method_may_be_called_healed_and_a_folder_be_named_by_dots(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    folder = copy("smf")
    named = folder.with_name("healed-3a4c583156")
    folder.rename(named)
    health = seen(named)
    assert health.state == "finished" and said(health, act=True) == []
    unfinished = copy("lora")
    expected = [line.rpartition("--output")[0] for line in said(seen(unfinished), act=True)]
    (unfinished / "inner").mkdir()
    for place, path in ((unfinished, "."), (unfinished / "inner", "..")):
        monkeypatch.chdir(place)
        assert [line.rpartition("--output")[0] for line in said(seen(Path(path)), act=True)] == expected


def test_failures_skipped_steps_and_remains_are_told(copy: Callable[[str], Path]):
    folder = copy("lora")
    failure = {"method": "lora", "options": {"lr": 1.0}, "seed": 0, "comparison": "x", "reason": "it diverged"}
    (folder / "failed.json").write_text(json.dumps(failure))
    (folder / "skipped.json").write_text(json.dumps([{"step": 3, "not_finite": "loss", "examples": ["a"]}]))
    (folder / "checkpoints" / "set-aside-4").mkdir()
    (folder / "checkpoints" / "set-aside-4" / "file").write_bytes(bytes(2**20))
    (folder / ".result.json.x.part").write_text("{")
    health = seen(folder)
    assert (
        health.state == "failed"
        and health.skipped == 1
        and "its training failed: it diverged" in said(health, act=True)[0]
    )
    notes = "\n".join(said(health, act=False))
    assert "1 steps were skipped" in notes and "takes 1.0 MiB -> rm -r" in notes and ".part" in notes
    (copy("smf") / "result.broken.json").write_text("{")
    assert "rm -r" in said(seen(copy("smf")), act=False)[0] and said(seen(copy("smf")), act=True) == []


def test_names_of_folders_cannot_run_anything(copy: Callable[[str], Path], tmp_path: Path):
    folder = tmp_path / "a'; touch hacked; $(touch hacked) `touch hacked`\n\x1b[31m" / copy("lora").name
    shutil.copytree(copy("lora"), folder)
    do = seen(folder).findings[-1].do
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {do}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert words.stdout.split("\n")[:2] == ["smf", "train"] and not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_runs_is_refused(tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^no (folder at|run in) .*" + name):
        look_at(tmp_path / name)


def test_where_only_a_trial_ran_its_folder_is_named(tmp_path: Path):
    (tmp_path / "runs-trial").mkdir()
    for read in (look_at, lambda path: read_runs([path])):
        with pytest.raises(ConfigError, match=r"^no folder at .*runs \(there is .*runs-trial, of a trial\); give"):
            read(tmp_path / "runs")


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "environment", lambda: ({"python": "3"}, []))


def test_exit_codes_and_json(
    copy: Callable[[str], Path], well: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "argv", ["smf", "doctor", str(copy("smf"))])
    cli.main()
    assert "Nothing needs to be done." in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["smf", "doctor", str(copy("smf").parent), "--format", "json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and not found["well"] and len(found["runs"]) == 3
    assert [finding["act"] for finding in found["findings"]] == [True]
    monkeypatch.setattr(sys, "argv", ["smf", "doctor", str(copy("lora"))])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().out
    assert end.value.code == 1 and "To do:" in printed and f"smf train {copy('lora')}" in printed


# -- the environment --------------------------------------------------------------------------------------------------


def test_the_environment_is_told_without_a_hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    about, findings = environment()
    assert {"python", "torch", "device", "bfloat16", "memory", "hub", "extra [run]", "disk, here"} <= set(about)
    assert "does not answer" in about["hub"]
    (hub,) = [finding for finding in findings if finding.where == "hub"]
    assert not hub.act and "HF_HUB_OFFLINE=1" in hub.do
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert environment()[0]["hub"].startswith("offline, by HF_HUB_OFFLINE")


def test_what_never_answers_is_not_waited_for():
    import time

    assert _within(0.05, lambda: time.sleep(30)) == "no answer in time"  # type: ignore[arg-type]


def test_packages_that_do_not_go_together_are_told(monkeypatch: pytest.MonkeyPatch):
    installed = {"torchvision": "0.20", "torch": "2.6.0", "here": "1.0"}
    needs = {"torchvision": ["torch==2.5.0", "numpy; extra == 'x'", "not a requirement!"], "here": ["torch>=2.6"]}

    def version(name: str) -> str:
        if name not in installed:
            raise doctor.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", needs.get)
    (finding,) = unmet(["torchvision", "here", "absent"])
    assert finding.what == "torchvision 0.20 needs torch==2.5.0; 2.6.0 is installed" and finding.act
    assert finding.do == "pip install -U 'torch==2.5.0'"


@pytest.mark.parametrize(("free", "acts"), [(2**40, False), (2**20, True)])
def test_a_disk_or_memory_that_is_nearly_full_is_to_be_acted_on(monkeypatch: pytest.MonkeyPatch, free: int, acts: bool):
    class Usage:
        pass

    usage = Usage()
    usage.free = free  # type: ignore[attr-defined]
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor, "available_memory", lambda: free)
    found = [*doctor._disks({}), *doctor._memory({})]
    assert any(finding.act for finding in found) == acts
    assert sum("are free" in finding.what or "are left" in finding.what for finding in found) == (4 if acts else 0)


# -- hostile folders --------------------------------------------------------------------------------------------------


OTHERS = ["gone", "folder", "pipe", "/dev/zero", "..", "/nowhere", "itself"]
NAMES = ["checkpoint-٣", "checkpoint-" + "9" * 200, "set-aside-4", "healed-x", "\udcff"]


def replaced_by(path: Path, kind: str) -> None:
    """Something else in the place of a file or folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("/dev/zero", "..", "/nowhere"):
        path.symlink_to(kind)
    elif kind == "itself":
        path.symlink_to(path)


def fuzzed(runs: Path, folder: Path, data: st.DataObject) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(runs, folder)
    for _ in range(data.draw(st.integers(1, 3))):
        paths = sorted(path for path in folder.rglob("*") if not path.is_symlink())
        path = data.draw(st.sampled_from([path for path in paths if path.suffix != ".txt"]))
        how = data.draw(st.sampled_from(["bytes", "junk", "replace", "replace", "name"]))
        if how == "replace":
            replaced_by(
                path, data.draw(st.sampled_from(["gone", "folder", "pipe", "/dev/zero", "..", "/nowhere", "itself"]))
            )
        elif how == "name":
            name = data.draw(
                st.sampled_from(["checkpoint-٣", "checkpoint-" + "9" * 200, "set-aside-4", "healed-x", "\udcff"])
            )
            if not os.path.lexists(path.with_name(name)):
                path.rename(path.with_name(name))
        elif path.is_file() and how == "bytes":
            path.write_bytes(edited(path.read_bytes(), data.draw(BYTES)))
        elif path.is_file() and path.suffix == ".json":
            try:
                found = json.loads(path.read_bytes())
            except ValueError:
                continue
            path.write_bytes(json.dumps(with_junk(data, found)).encode())
    with within(60), explained(folder):
        try:
            examine([folder], as_json=data.draw(st.booleans()))
        except SmfError:
            assert not [path for path in folder.iterdir() if path.is_dir() and (path / "recipe.toml").exists()]


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_whatever_a_folder_holds_it_is_told_or_refused(
    runs: tuple[Recipe, Path], tmp_path: Path, count: int, well: None, monkeypatch: pytest.MonkeyPatch
):
    @settings(
        max_examples=count, deadline=None, database=None, derandomize=count == 60, suppress_health_check=[*HealthCheck]
    )
    @given(st.data())
    def everything(data: st.DataObject) -> None:
        fuzzed(runs[1], tmp_path / "any", data)

    everything()


def test_deep_manifests_and_locks_are_no_end(copy: Callable[[str], Path]):
    folder: Any = copy("lora")
    (folder / "checkpoints" / "checkpoint-4" / MANIFEST).write_text("[" * 100_000)
    for content in ("[" * 100_000, '{"pid": 1e999, "host": 1}', '{"pid": ' + "9" * 900 + ', "host": "x"}', "\0"):
        (folder / LOCK).write_text(content)
        assert seen(folder).newest == 2
