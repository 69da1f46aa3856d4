"""What machines and people do to runs: kills, full disks, too little memory, two processes at one run."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smf import cli, loop, train
from smf.checkpoints import flaw, seal
from smf.compare import compare, result_path
from smf.errors import BusyError, ConfigError, StorageError, TrainingError
from smf.faults import explained
from smf.jobs import start_server
from smf.locks import LOCK, held_by, is_held, working_in
from smf.loss import MeanTokenLoss
from smf.recipe import Method, Recipe
from smf.recipe_file import load_recipe
from smf.runs import FAILED
from smf.train import run_method
from tiny import make_world


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    start_server(["smf.train", "smf.report", "lm_eval.models.huggingface"])


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def begin(function: Callable[..., None], *arguments: object) -> Any:
    """A process that has imported everything, whose output nobody reads."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


def ended(process: Any) -> int:
    process.join(300)
    assert process.exitcode is not None, "it goes on"
    return process.exitcode


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 400
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def without_costs(value: Any) -> Any:
    """But for what differs from run to run: seconds, and the memory of a process."""
    if isinstance(value, dict):
        costs = ("seconds", "peak_memory_mb", "folder", "provenance")
        return {key: without_costs(inner) for key, inner in value.items() if key not in costs}
    return [without_costs(inner) for inner in value] if isinstance(value, list) else value


def assert_same_runs(one: Recipe, other: Recipe, names: tuple[str, ...]) -> None:
    """The results of two output folders are equal to the last bit."""
    for name in names:
        a, b = (result_path(recipe, name).parent for recipe in (one, other))
        assert without_costs(json.loads((a / "result.json").read_text())) == without_costs(
            json.loads((b / "result.json").read_text())
        )
        files, others = ({str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in (a, b))
        assert files == others
        for file in files - {"result.json", "recipe.toml"}:
            assert (a / file).read_bytes() == (b / file).read_bytes(), file


# -- SIGKILL ----------------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[Any, str]] = {
    "step": (MeanTokenLoss, "__call__"),
    "save": (loop.RunTrainer, "_save_checkpoint"),
    "score": (train, "_score"),
    "finish": (train, "_saved"),
    "report": (cli, "_publish"),
}


def everything(recipe_file: Path, output: Path, place: str = "", call: int = 0, share: float = 0.0) -> None:
    """Two methods and their report; killed within a call of a place, after a share of the time that such calls take."""
    os.dup2(os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    times = output.with_suffix(".times")
    took = json.loads(times.read_text()) if times.is_file() else {}
    for name in PLACES:
        _watch(name, took, call if name == place else 0, share)
    recipe = load_recipe(recipe_file, output=str(output))
    run_method(recipe, "smf")
    run_method(recipe, "base")
    cli.report((output,))
    times.write_text(json.dumps(took))


def _watch(place: str, took: dict[str, float], deadly: int, share: float) -> None:
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), []

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        began = time.perf_counter()
        if len(calls) != deadly:
            result = real(*arguments, **options)
            took[place] = time.perf_counter() - began
            return result
        threading.Timer(share * took[place], os.kill, (os.getpid(), signal.SIGKILL)).start()
        real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, watched)


@pytest.mark.parametrize(
    ("steps", "kills"),
    [
        (8, {"step or save": 1, "score or finish": 1, "report": 1}),
        pytest.param(50, {"step": 6, "save": 5, "score": 4, "finish": 2, "report": 3}, marks=pytest.mark.slow),
    ],
    ids=["3", "20"],
)
def test_killed_anywhere_it_ends_as_if_it_had_not_been(world: Path, tmp_path: Path, steps: int, kills: dict[str, int]):
    text = world.read_text().replace("steps = 4\n", f"steps = {steps}\nscore_at = [0.3, 0.7]\n")
    world.write_text(text.replace("save_every = 2", "save_every = 3"))
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert ended(begin(everything, world, calm)) == 0
    killed.with_suffix(".times").write_text(calm.with_suffix(".times").read_text())
    chance = random.Random(os.urandom(8))
    for places in [places for places, count in kills.items() for _ in range(count)]:
        place = chance.choice(places.split(" or "))
        call = chance.randint(1, 16) if place == "step" else 1  # four are a step
        moment = (place, call, chance.random())
        print("killed in", moment)
        assert ended(begin(everything, world, killed, *moment)) == -signal.SIGKILL, killed.with_suffix(
            ".log"
        ).read_text()
    assert ended(begin(everything, world, killed)) == 0
    one, other = (load_recipe(world, output=str(folder)) for folder in (calm, killed))
    assert_same_runs(one, other, ("base", "smf"))
    summaries = [without_costs(json.loads((folder / "summary.json").read_text())) for folder in (calm, killed)]
    assert summaries[0] == summaries[1] and (killed / "report.html").is_file()


# -- SIGTERM ----------------------------------------------------------------------------------------------------------


def stopped_after(recipe_file: Path, output: Path, steps: int) -> None:
    """A training that gets SIGTERM in its step `steps + 1`."""
    torch.set_num_threads(1)
    real, calls = MeanTokenLoss.__call__, []

    def loss_of(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 * steps + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    MeanTokenLoss.__call__ = loss_of
    run_method(load_recipe(recipe_file, output=str(output)), "lora")


def test_sigterm_saves_a_checkpoint_and_the_next_start_goes_on(world: Path, tmp_path: Path):
    """In a step between two that are saved and logged, of a method that draws random numbers in every step."""
    text = world.read_text().replace("steps = 4\n", "steps = 60\n").replace("save_every = 2", "save_every = 50")
    world.write_text(text.replace("alpha = 4.0", "alpha = 4.0\ndropout = 0.5"))
    recipe, calm = (load_recipe(world, output=str(tmp_path / name)) for name in ("stopped", "calm"))
    assert ended(begin(stopped_after, world, tmp_path / "stopped", 6)) == 75
    folder = result_path(recipe, "lora").parent
    assert [path.name for path in folder.glob("checkpoints/*")] == ["checkpoint-7"]
    assert flaw(folder / "checkpoints" / "checkpoint-7") is None
    assert not (folder / FAILED).exists() and not (folder / "result.json").exists()
    run_method(recipe, "lora")
    run_method(calm, "lora")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 20  # a mean of three steps each
    assert_same_runs(calm, recipe, ("lora",))


@pytest.mark.slow
def test_sigterm_to_a_comparison_stops_its_jobs_with_checkpoints(world: Path):
    text = world.read_text().replace("steps = 4\n", "steps = 99\n").replace("save_every = 2", "save_every = 99")
    world.write_text(text.replace("micro_batch_size = 2", "micro_batch_size = 8"))
    line = [sys.executable, "-m", "smf", "compare", str(world), "--methods", "smf"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        folder = result_path(load_recipe(world), "smf").parent
        metrics = folder / "metrics.jsonl"
        wait_for(lambda: process.poll() is not None or (metrics.is_file() and metrics.stat().st_size))
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=200)[1]
    assert process.returncode == 75 and "smf: stopped by SIGTERM; the same command goes on" in printed, printed[-2000:]
    (checkpoint,) = folder.glob("checkpoints/checkpoint-*")
    assert flaw(checkpoint) is None and "stopped by SIGTERM after step" in (folder / "log.txt").read_text()
    assert "Traceback" not in printed + (folder / "log.txt").read_text()


# -- two processes ----------------------------------------------------------------------------------------------------


def hold(folder: Path) -> None:
    with working_in(folder, wait=False):
        time.sleep(300)


def test_a_second_process_is_refused_by_name_and_a_dead_ones_lock_is_taken_over(
    world: Path, capfd: pytest.CaptureFixture
):
    recipe = load_recipe(world)
    folder = result_path(recipe, "base").parent
    folder.mkdir(parents=True)
    other = begin(hold, folder)
    wait_for(lambda: is_held(folder / LOCK) and (folder / LOCK).stat().st_size)
    holder = f"process {other.pid} on {socket.gethostname()}"
    with pytest.raises(BusyError, match=f"in use by {holder}; wait until it has ended, or give another --output"):
        run_method(recipe, "base")
    other.kill()
    ended(other)
    assert (folder / LOCK).stat().st_size and not is_held(folder / LOCK)
    assert run_method(recipe, "base")["method"] == "base"
    assert f"{holder} ended before its run was done; going on with it\n" in capfd.readouterr().err
    (folder / "result.json").unlink()
    (folder / LOCK).write_text('{"pid": 7, "host": "elsewhere"}')
    run_method(recipe, "base")
    assert "process 7 on elsewhere ended" in (printed := capfd.readouterr().err) and "cannot lock between" in printed
    assert (folder / LOCK).read_bytes() == b""


def wait_and_say(folder: Path) -> None:
    with working_in(folder, wait=True):
        (folder / "mark").touch()


def test_a_lock_whose_file_was_removed_is_still_held(tmp_path: Path, capfd: pytest.CaptureFixture):
    other = begin(hold, tmp_path)
    wait_for(lambda: (tmp_path / LOCK).is_file() and (tmp_path / LOCK).stat().st_size)
    for _ in range(2):  # a refused process leaves all as it was
        with pytest.raises(BusyError, match=f"process {other.pid} on"), working_in(tmp_path, wait=False):
            pass
        assert is_held(tmp_path / LOCK) and json.loads((tmp_path / LOCK).read_text())["pid"] == other.pid
    (tmp_path / LOCK).unlink()
    waiting = begin(wait_and_say, tmp_path)
    for _ in range(2):
        with pytest.raises(BusyError, match="in use by another process"), working_in(tmp_path, wait=False):
            pass
        assert is_held(tmp_path / LOCK) and held_by(tmp_path / LOCK) == ("another process", True)
    time.sleep(0.5)
    assert waiting.is_alive() and not (tmp_path / "mark").exists()
    other.kill()
    ended(other)
    waiting.join(60)
    assert waiting.exitcode == 0 and (tmp_path / "mark").exists() and held_by(tmp_path / LOCK) is None
    assert "ended before" not in capfd.readouterr().err  # a file that is gone names nobody


def test_where_folders_cannot_be_locked_the_file_alone_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(file: Any, how: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EBADF, "as on NFS")
        real(file, how)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with working_in(tmp_path, wait=False):
        with pytest.raises(BusyError, match=f"process {os.getpid()} on"), working_in(tmp_path, wait=False):
            pass
        assert is_held(tmp_path / LOCK)
    with working_in(tmp_path, wait=False):
        pass
    assert not is_held(tmp_path / LOCK)


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with 200 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def test_a_disk_that_is_full_or_read_only_is_said_and_loses_nothing(world: Path, tmp_path: Path, small_disk: Path):
    recipe, calm = (load_recipe(world, output=str(folder)) for folder in (small_disk, tmp_path / "calm"))
    run_method(recipe, "base")
    with pytest.raises(StorageError, match=r"the disk is full; 0 MiB are free .*the same command goes on") as full:
        run_method(recipe, "full")
    assert "\n" not in str(full.value)
    remount(small_disk, "ro")
    with pytest.raises(ConfigError, match=r"cannot be written: .*[Rr]ead-only"):
        run_method(recipe, "full")
    with pytest.raises(StorageError, match="the disk is read-only"), explained(small_disk):
        (small_disk / "anything").touch()
    remount(small_disk, "rw,size=50m")
    for name in ("base", "full"):
        run_method(recipe, name)
        run_method(calm, name)
    assert_same_runs(calm, recipe, ("base", "full"))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_cannot_be_written_to_its_end_is_said(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
):
    """By the limit of a file's size, in the first of two saves."""
    recipe = load_recipe(world)
    folder = result_path(recipe, "full").parent
    size = {"model.safetensors": 100_000, "optimizer.pt": 300_000}[file]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(StorageError, match=r"larger than .*the same command goes on from the last checkpoint"):
            run_method(recipe, "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (folder / "checkpoints" / "checkpoint-2").is_dir() and not (folder / "result.json").exists()
    assert run_method(recipe, "full")["steps"] == 4


def test_the_result_that_cannot_be_written_is_written_by_the_next_start(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    recipe = load_recipe(world)

    def refuse(path: Path, value: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(train, "write_json", refuse)
        with pytest.raises(StorageError, match=r"result\.json: the disk.*goes on from the last checkpoint"):
            run_method(recipe, "smf")
    capfd.readouterr()
    assert run_method(recipe, "smf")["steps"] == 4
    assert "resuming from" in capfd.readouterr().err


# -- what lies in a run's folder --------------------------------------------------------------------------------------


class HaltError(Exception):
    """Ends a training in a test."""


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The recipe of a run that ended after its save in step 4 of 6, and its output folder."""
    folder = tmp_path_factory.mktemp("halted")
    world = make_world(folder)
    world.write_text(world.read_text().replace("steps = 4\n", "steps = 6\nscore_at = [0.5]\n"))
    real = loop.RunTrainer._save_checkpoint

    def save(trainer: Any, *arguments: Any) -> None:
        real(trainer, *arguments)
        if trainer.state.global_step == 4:
            raise HaltError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.RunTrainer, "_save_checkpoint", save)
        with pytest.raises(HaltError):
            run_method(load_recipe(world), "smf")
    return world, folder / "runs"


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def moved(path: Path) -> None:
    path.symlink_to(path.rename(path.parents[1] / "elsewhere"))


def into_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)


SPOILT: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "a folder for a lock": (lambda run: into_folder(run / LOCK), "a folder is where a file should be"),
    "a folder for metrics": (lambda run: into_folder(run / "metrics.jsonl"), "a folder is where a file should be"),
    "a folder for a patch": (lambda run: into_folder(run / "patch.smf"), "a folder is where a file should be"),
    "a lock of nobody": (lambda run: (run / LOCK).write_text('{"pid": "x", "host": []}'), None),
    "a lock of this process": (
        lambda run: (run / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()})),
        None,
    ),
    "metrics": (lambda run: (run / "metrics.jsonl").write_bytes(b'\xff\n{}\n[]\n3\n{"step": "a"}\n'), None),
    "skipped steps": (lambda run: (run / "skipped.json").write_text("{]"), "remove .* to begin this run anew"),
    "other skipped steps": (lambda run: (run / "skipped.json").write_text("[3]"), "remove .* to begin this run anew"),
    "scores": (lambda run: (run / "scores" / "step-3.json").write_text("{"), "remove .* to begin this run anew"),
    "other scores": (lambda run: (run / "scores" / "step-3.json").write_text('{"a": {}}'), "with role, task, metrics"),
    "a link for a checkpoint": (lambda run: (run / "checkpoints" / "checkpoint-99").symlink_to("nowhere"), None),
    "a checkpoint of something else": (lambda run: seal(run / "checkpoints" / "checkpoint-4"), "remove it to go on"),
    "checkpoints elsewhere": (lambda run: moved(run / "checkpoints"), "checkpoints is a link, through which"),
    "scores elsewhere": (lambda run: moved(run / "scores"), "scores is a link, through which"),
    "metrics without end": (lambda run: os.truncate(run / "metrics.jsonl", 2**31), "metrics.jsonl has 2,147,483,648"),
    "a manifest without end": (
        lambda run: os.truncate(run / "checkpoints" / "checkpoint-4" / "smf_complete.json", 2**31),
        None,
    ),
    "a pipe for skipped steps": (lambda run: os.mkfifo(run / "skipped.json"), "skipped.json is not a regular file"),
    "a pipe for scores": (lambda run: into_pipe(run / "scores" / "step-3.json"), "step-3.json is not a regular file"),
    "a file for scores": (lambda run: into_file(run / "scores"), "scores is no folder; remove it to go on"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_broken_in_a_runs_folder_is_said_or_made_anew(halted: tuple[Path, Path], tmp_path: Path, what: str):
    world, output = halted
    shutil.copytree(output, tmp_path / "runs")
    recipe = load_recipe(world, output=str(tmp_path / "runs"))
    spoil, message = SPOILT[what]
    spoil(result_path(recipe, "smf").parent)
    if message is None:
        assert run_method(recipe, "smf")["steps"] == 6
        return
    with pytest.raises(StorageError if "folder" in what else TrainingError, match=message):
        run_method(recipe, "smf")


def test_a_healed_memory_that_is_not_what_was_written_is_healed_again(world: Path, capfd: pytest.CaptureFixture):
    recipe = load_recipe(world)
    scores = run_method(recipe, "smf-healed")["scores"]
    shutil.rmtree(result_path(recipe, "smf-healed").parent)
    (healed,) = Path(recipe.output).glob("healed-*/adapter_model.safetensors")
    content = bytearray(healed.read_bytes())
    content[-100] ^= 64
    healed.write_bytes(content)
    capfd.readouterr()
    assert run_method(recipe, "smf-healed")["scores"] == scores
    printed = capfd.readouterr().err
    assert f"healing again: in {healed.parent} {healed.name} is not what was written" in printed


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory\nand more"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_all_words_for_too_little_memory_are_known(error: Exception, tmp_path: Path):
    with pytest.raises(TrainingError, match=r"out of memory: .*Lower micro_batch_size"), explained(tmp_path):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/a/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. GLHF!"),
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
    ],
)
def test_a_rank_that_has_gone_is_said_by_the_others(error: Exception, tmp_path: Path):
    message = r"another rank has gone, and what it said tells why \(.*\)\. The same command goes on .* --max-restarts=N"
    with pytest.raises(TrainingError, match=message), explained(tmp_path):
        raise error


# -- a grid -----------------------------------------------------------------------------------------------------------

KINDS = """
import os, signal
from pathlib import Path
import torch
from smf import methods

def failing(model, method, recipe, loaded):
    how = method.options["how"]
    if Path(recipe.output, "trouble").exists():
        if how == "memory":
            raise MemoryError
        if how == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\\nand much more")
        if how == "cpu":
            torch.empty(2**60)
        if how == "exit":
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return methods.full(model, method, recipe, loaded)
"""


def test_one_method_of_a_grid_that_fails_leaves_the_others_and_is_done_by_the_next_start(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    (tmp_path / "own_kinds.py").write_text(KINDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(world)
    ways = ("memory", "gpu", "cpu", "exit", "kill")
    failing = {how: Method(kind="own_kinds:failing", lr=1e-3, options={"how": how}) for how in ways}
    known = {name: recipe.methods[name] for name in ("base", "lora")}
    recipe = replace(recipe, methods=failing | known, train=replace(recipe.train, steps=2), jobs=2)
    trouble = Path(recipe.output) / "trouble"
    trouble.parent.mkdir()
    trouble.touch()
    with pytest.raises(
        TrainingError, match=r"did not finish: \['memory, .*'gpu, .*'cpu, .*'exit, .*'kill, lr 0.001"
    ) as end:
        compare(recipe)
    assert "lora" not in str(end.value)
    printed = capfd.readouterr().err
    assert printed.count("smf: error: out of memory: ") == 3 and "Traceback" not in printed
    assert "out of memory: CUDA out of memory. Tried to allocate 9 GiB. Lower micro_batch_size" in printed
    assert "ended with exit code -9 (killed, as the system does when memory runs out)" in printed
    for how in ("memory", "gpu", "cpu"):
        assert "out of memory" in json.loads(result_path(recipe, how).with_name(FAILED).read_text())["reason"]
    before = result_path(recipe, "lora").stat().st_mtime_ns
    trouble.unlink()
    results = compare(recipe)
    assert [result["method"] for result in results] == [*ways, "base", "lora"]
    assert result_path(recipe, "lora").stat().st_mtime_ns == before
    assert not list(Path(recipe.output).glob(f"*/{FAILED}"))
