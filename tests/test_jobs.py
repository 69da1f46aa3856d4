"""Jobs in processes of their own."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import smf.jobs as jobs_module
from smf.cli import Overrides
from smf.errors import ConfigError
from smf.jobs import Job, _last_lines, run_jobs, start_server
from smf.recipe_file import load_recipe


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    start_server(["smf.jobs"])


def meet(mine: Path, other: Path) -> None:
    """Ends only while the other job runs."""
    mine.touch()
    deadline = time.monotonic() + 60
    while not other.exists():
        assert time.monotonic() < deadline, "the other job never began"
        time.sleep(0.02)


def note_times(file: Path) -> None:
    begun = time.monotonic()
    time.sleep(0.3)
    file.write_text(f"{begun} {time.monotonic()} {os.getpid()} {torch.get_num_threads()}")


def linger(file: Path) -> None:
    file.with_suffix(".part").write_text(str(os.getpid()))
    file.with_suffix(".part").rename(file)
    time.sleep(300)


def speak(words: str) -> None:
    print(words)
    print(words.upper(), file=sys.stderr)


def die(words: str) -> None:
    os.write(2, f"{words}\n".encode())
    os.abort()


def refuse(words: str) -> None:
    raise ConfigError(words)


def test_two_jobs_run_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture):
    one, two = tmp_path / "one", tmp_path / "two"
    logs = [tmp_path / "log1", tmp_path / "log2"]
    run_jobs([Job("one", meet, (one, two), logs[0]), Job("two", meet, (two, one), logs[1])], at_once=2)
    assert one.exists() and two.exists()
    printed = capfd.readouterr().err
    assert "smf: one: done in" in printed and "smf: two: done in" in printed


def say_how_threads_wait(file: Path) -> None:
    file.write_text(os.environ.get("OMP_WAIT_POLICY", ""))


def test_threads_of_jobs_sleep_while_they_wait_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "FORKS", False)  # a server that runs has the environment that it began with
    for told, expected in ((None, "passive"), ("active", "active")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if told is not None:
            monkeypatch.setenv("OMP_WAIT_POLICY", told)
        start_server([])
        run_jobs([Job("says", say_how_threads_wait, (tmp_path / expected,), tmp_path / "log")], 1)
        assert (tmp_path / expected).read_text() == expected


def test_where_forking_is_not_safe_each_job_imports_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(jobs_module, "FORKS", False)
    run_jobs([Job("speaks", speak, ("first",), tmp_path / "1"), Job("refuses", refuse, ("no",), tmp_path / "2")], 2)
    assert "FIRST" in (tmp_path / "1").read_text()
    assert "smf: error: no" in capfd.readouterr().err


def test_an_interrupt_ends_all_jobs(tmp_path: Path):
    code = f"""
import signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from pathlib import Path
from smf.jobs import Job, run_jobs
from test_jobs import linger
if __name__ == "__main__":
    run_jobs([Job(n, linger, (Path({str(tmp_path)!r}) / n,), Path({str(tmp_path)!r}) / (n + ".txt")) for n in "ab"], 2)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 100
    while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends on Ctrl-C
    process.communicate(timeout=60)
    assert process.returncode != 0
    for name in "ab":
        assert not Path(f"/proc/{(tmp_path / name).read_text()}").exists()


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_jobs_run_than_may(tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    files = [tmp_path / str(i) for i in range(5)]
    run_jobs([Job(str(i), note_times, (file,), tmp_path / "log") for i, file in enumerate(files)], at_once)
    noted = [file.read_text().split() for file in files]
    times = [(float(begun), float(ended)) for begun, ended, _, _ in noted]
    assert all(sum(b <= begun < e for b, e in times) <= at_once for begun, _ in times)
    assert len({process for _, _, process, _ in noted} | {str(os.getpid())}) == 6  # each has one of its own
    assert {int(threads) for *_, threads in noted} == {6 // at_once}


def test_all_that_a_job_prints_is_appended_to_its_log(tmp_path: Path, capfd: pytest.CaptureFixture):
    log = tmp_path / "folder" / "log.txt"
    for words in ("first", "again"):
        run_jobs([Job("speaks", speak, (words,), log)], at_once=1)
    assert sorted(log.read_text().split()) == ["AGAIN", "FIRST", "again", "first"]
    printed = capfd.readouterr()
    assert printed.out == "" and "smf: speaks: done in" in printed.err and "FIRST" not in printed.err


def test_a_job_that_fails_says_why_and_leaves_the_others_alone(tmp_path: Path, capfd: pytest.CaptureFixture):
    file = tmp_path / "file"
    jobs = [
        Job("dies", die, ("something terrible",), tmp_path / "1.txt"),
        Job("refuses", refuse, ("give another one",), tmp_path / "2.txt"),
        Job("works", note_times, (file,), tmp_path / "3.txt"),
    ]
    run_jobs(jobs, at_once=2)
    printed = capfd.readouterr().err
    assert "smf: dies: ended with exit code -6" in printed and "something terrible" in printed
    assert "smf: refuses: ended with exit code 2" in printed and "smf: error: give another one" in printed
    assert "Traceback" not in printed and str(tmp_path / "1.txt") in printed
    assert file.is_file()
    run_jobs([Job("dies too", die, ("of another cause",), tmp_path / "1.txt")], at_once=1)
    assert "terrible" not in capfd.readouterr().err  # what an earlier try printed is not why this one failed


def test_last_lines_of_a_log_are_what_a_terminal_would_show(tmp_path: Path):
    log = tmp_path / "log.txt"
    assert _last_lines(log, 1) == []
    log.write_bytes(b"begun\n\r  0%|   | 0/9\r 50%|## | 4/9\r\nscoring\n\n\r 10%|#\r 20%|##\r ")
    assert _last_lines(log, 1) == [" 20%|##"]
    assert _last_lines(log, 9) == ["begun", " 50%|## | 4/9", "scoring", " 20%|##"]
    log.write_bytes(b"\xff" * 100_000 + "\nlast é".encode())
    assert _last_lines(log, 1) == ["last é"]


def hold(lock: Path, until: Path) -> None:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock.with_suffix(".held").touch()
        deadline = time.monotonic() + 60
        while not until.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def touch(file: Path) -> None:
    file.touch()


def test_jobs_that_another_process_does_wait_and_the_others_go_first(tmp_path: Path):
    lock, done = tmp_path / "a.lock", tmp_path / "b"
    other = multiprocessing.get_context("spawn").Process(target=hold, args=(lock, done))
    other.start()
    deadline = time.monotonic() + 60
    while not lock.with_suffix(".held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first = Job("a", note_times, (tmp_path / "a",), tmp_path / "a.txt", lock)
    second = Job("b", touch, (done,), tmp_path / "b.txt", tmp_path / "b.lock")  # which lets the other process end
    run_jobs([first, second], at_once=1)
    other.join()
    assert float((tmp_path / "a").read_text().split()[0]) > 0 and done.exists()


def test_how_many_run_at_a_time_is_no_part_of_a_runs_name():
    one, two = (load_recipe("local_example.toml", jobs=jobs) for jobs in (1, 2))
    assert [recipe.jobs for recipe in (one, two)] == [1, 2]
    assert all(one.run_id(name) == two.run_id(name) for name in one.methods)


def test_no_jobs_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="jobs = 0; expected a finite number of at least 1"):
        Overrides(jobs=0).load(Path("local_example.toml"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('jobs = 0\n[methods.base]\nkind = "base"\n')
    with pytest.raises(ConfigError, match="jobs = 0"):
        load_recipe(recipe)
