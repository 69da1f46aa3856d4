"""The scripts in examples/ run from beginning to end, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
