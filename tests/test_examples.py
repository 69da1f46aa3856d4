"""The scripts in examples/ run from beginning to end, small."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smf.errors import ConfigError

REPO = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_domains", "who_wrote_what"])
def test_example_writes_its_table_and_goes_on(name: str, tmp_path: Path):
    command = [sys.executable, str(REPO / "examples" / f"{name}.py"), "--output", str(tmp_path)]
    command += ["--seeds", "1", "--steps", "2", "--limit", "8"]
    for _ in range(2):  # the second time everything is there
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "smf: scoring" not in done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seeds"] == 1 and result["steps"] == 2
    table = (tmp_path / "table.md").read_text()
    rows = result["rows"]
    assert all(label in table for label in rows) and len(rows) >= 6
    if name == "two_domains":
        assert set(rows["base"]) == {"first", "second", "third", "near-domain", "closed-book", "general-text"}
        spared, plain = (result["shared"][f"in sequence{how}: two"][0] for how in (", sparing earlier rows", ""))
        assert spared["shared"] < plain["shared"] / 2
    else:
        assert rows["theirs, share 1"] == rows["random, share 1"] < rows["theirs, share 0.25"]


def test_the_overlap_of_reads_is_measured_and_drawn(tmp_path: Path):
    command = [sys.executable, str(REPO / "examples" / "read_overlap.py"), "--pairs", "12", "--output", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "overlap.png").stat().st_size > 1000
    measured = json.loads((tmp_path / "overlap.json").read_text())["overlap"]
    same, known = measured["the same fact, asked otherwise"], measured["a known disease, asked alike"]
    assert all(0 <= share <= 1 for by_layer in measured.values() for share in by_layer.values())
    assert same["5"] > 5 * known["5"] and same["2"] < 5 * known["2"]  # what docs/late_rows.md says of these layers


@pytest.mark.slow
def test_a_killed_sequence_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    sequence = importlib.import_module("sequence")
    monkeypatch.setattr(sequence, "TARGETS", ("first", "second"))
    options = {"seeds": 1, "methods": ("late-rows", "lora", sequence.LESSONS), "steps": 1, "limit": 3}
    sequence.main(tmp_path / "whole", **options)
    score, calls = sequence.score, []

    def killed(*args: object) -> dict[str, object]:
        calls.append(args)
        if len(calls) in (3, 6, 9):  # while a method's model of the second target is scored
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(sequence, "score", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            sequence.main(tmp_path / "killed", **options)
    sequence.main(tmp_path / "killed", **options)
    assert len(calls) == 1 + 6 + 3  # the base, each target of each method once, and what was killed
    whole, gone_on = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed"))
    costs = whole.pop("costs"), gone_on.pop("costs")  # seconds differ
    assert whole == gone_on and all(len(after) == 2 for after in whole["after"].values())
    for name in options["methods"]:  # a replay of half takes twice the steps, for as many lessons
        assert [stage["steps"] for stage in costs[0][name][0]] == [2 if name == sequence.LESSONS else 1] * 2
    rows = [stage["rows"] for stage in costs[0]["late-rows"][0]]
    assert rows[0]["earlier"] == 0 < rows[1]["earlier"] < rows[1]["written"] == 1024
    with pytest.raises(ConfigError, match="was begun with"):
        sequence.main(tmp_path / "whole", **(options | {"steps": 2}))


def test_targets_of_a_sequence_share_no_disease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    sequence, own = importlib.import_module("sequence"), importlib.import_module("targets")
    targets = own.load_targets(tmp_path, 0, 0, sequence.TARGETS, sequence.recipe_of(tmp_path))
    taught = {target: {own.disease(lesson.id) for lesson in targets.lessons[target]} for target in sequence.TARGETS}
    for target, diseases in taught.items():
        asked = [own.disease(item["id"]) for item in targets.scored[target].items]
        assert len(diseases) == 36 and set(asked) <= diseases and len(asked) > 100
    assert len(set.union(*taught.values())) == 180


def test_the_front_of_a_summary_is_drawn(tmp_path: Path):
    script = REPO / "examples" / "front.py"
    summary, picture = REPO / "docs" / "results" / "demo.json", tmp_path / "front.png"
    subprocess.run([sys.executable, str(script), str(summary), str(picture)], check=True)
    assert picture.read_bytes().startswith(b"\x89PNG") and len(picture.read_bytes()) > 10_000
