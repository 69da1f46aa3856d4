"""Which checkpoints a run goes on from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smf.checkpoints import MANIFEST, newest_complete, read_manifest, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints after steps 2, 4 and 10, all whole."""
    for step in (2, 4, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        (checkpoint / "inner").mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(bytes(range(256)) * step)
        (checkpoint / "inner" / "adapter").write_text(f"after step {step}")
        seal(checkpoint, seconds=1.5)
    return tmp_path


def test_the_newest_is_taken_and_says_what_was_sealed(folder: Path, capsys: pytest.CaptureFixture):
    newest = newest_complete(folder, tidy=True)
    assert newest == folder / "checkpoint-10" and capsys.readouterr().err == ""
    manifest = read_manifest(newest)
    assert manifest["seconds"] == 1.5 and set(manifest["sha256"]) == {"optimizer.pt", "inner/adapter", MANIFEST}


def flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "optimizer.pt").read_bytes())
    content[77] ^= 1
    (checkpoint / "optimizer.pt").write_bytes(content)


def cut(checkpoint: Path) -> None:
    with (checkpoint / "optimizer.pt").open("r+b") as file:
        file.truncate(100)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edited(checkpoint: Path) -> None:
        manifest = read_manifest(checkpoint)
        change(manifest)
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))

    return edited


BROKEN = {
    "a bit": (flip, "optimizer.pt is not what was written"),
    "the end": (cut, "optimizer.pt is not what was written"),
    "a file": (lambda c: (c / "inner" / "adapter").unlink(), "inner/adapter is missing"),
    "the manifest's end": (lambda c: (c / MANIFEST).write_text('{"sha'), "cannot be checked"),
    "sums": (lambda c: (c / MANIFEST).write_text('{"seconds": 1}'), "cannot be checked (KeyError: 'sha256')"),
    "a fact": (edit(lambda m: m.update(seconds=2.5)), f"{MANIFEST} is not what was written"),
    "no fact": (edit(lambda m: m.pop("seconds")), f"{MANIFEST} is not what was written"),
    "no sums": (edit(lambda m: m["sha256"].clear()), "cannot be checked"),
    "a sum": (edit(lambda m: m["sha256"].pop("optimizer.pt")), "optimizer.pt was not there when it was written"),
    "one more file": (lambda c: (c / "scaler.pt").write_bytes(b""), "scaler.pt was not there when it was written"),
    "a folder for a manifest": (lambda c: ((c / MANIFEST).unlink(), (c / MANIFEST).mkdir()), "not written to its end"),
    "another manifest": (lambda c: (c / MANIFEST).write_text("[]"), "cannot be checked"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), "it was not written to its end"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_one_that_is_not_what_was_written_is_set_aside_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture, what: str
):
    spoil, reason = BROKEN[what]
    spoil(folder / "checkpoint-10")
    assert newest_complete(folder, tidy=False) == folder / "checkpoint-4"
    assert (folder / "checkpoint-10").is_dir() and capsys.readouterr().err == ""
    assert newest_complete(folder, tidy=True) == folder / "checkpoint-4"
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and str(folder / "checkpoint-10") in printed and reason in printed
    assert not (folder / "checkpoint-10").exists()
    cut_off = what in ("no manifest", "a folder for a manifest")
    assert (folder / "set-aside-10").is_dir() != cut_off  # a half-written one only takes up the disk
    assert newest_complete(folder, tidy=True) == folder / "checkpoint-4" and capsys.readouterr().err == ""


def test_where_none_holds_there_is_none(folder: Path):
    for checkpoint in folder.glob("checkpoint-*"):
        flip(checkpoint)
    (folder / "checkpoint-of-mine").mkdir()
    assert newest_complete(folder, tidy=True) is None and (folder / "checkpoint-of-mine").is_dir()
    assert newest_complete(folder / "nowhere", tidy=True) is None
