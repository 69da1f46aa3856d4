"""Every command and example of the README runs as it is written, with small stand-ins for models and data."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import make_world, write_lines

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text()
SMALL = ["--max-steps", "2", "--limit", "20"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_python_example_runs_as_it_stands_and_its_claims_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """But for the number of steps, and fewer texts and documents of the world."""
    import torch
    from transformers import AutoModelForCausalLM

    import smf
    from smf import world

    monkeypatch.chdir(tmp_path)
    rows = world.rows
    monkeypatch.setattr(world, "rows", lambda name: rows(name)[:40])
    (example,) = blocks("python")
    names: dict[str, Any] = {}
    exec(example.replace("max_steps=500", "max_steps=2"), names)
    model, first = names["model"].eval(), names["data"][0]
    prompt, answer = names["pairs"][0]
    end = names["tokenizer"].eos_token
    assert names["tokenizer"].decode(first["input_ids"]) == prompt + answer + end
    learned = [token for token in first["labels"] if token != -100]
    assert names["tokenizer"].decode(learned) == answer + end and first["input_ids"][-len(learned) :] == learned
    inputs = torch.tensor([first["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(world.BASE)(inputs).logits
    assert not torch.equal(model(inputs).logits, base)
    smf.load_patch("medicine.smf").revert(model)
    assert torch.equal(model(inputs).logits, base)


def test_pairs_of_json_lines_are_read_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"`(import json; pairs = [^`]+)`", README)
    write_lines(tmp_path / "train.jsonl", [{"prompt": "Say:", "completion": " it"}])
    names: dict[str, Any] = {}
    exec(" ".join(line.split()), names)
    assert names["pairs"] == [("Say:", " it")]


def test_every_command_is_of_a_kind_that_is_tested():
    assert commands()
    for line in commands():
        assert line.split()[0] in ("pip", "make", "smf"), line


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("make")])
def test_make_targets_exist(line: str):
    done = subprocess.run([*shlex.split(line), "--dry-run"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout or "smf" in done.stdout


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("pip")])
def test_extras_exist(line: str):
    import tomllib

    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\[(\w+)\]", line):
        assert extra in extras


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output folder for all commands, so that a run two of them need is made once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("smf")])
def test_smf_commands_run(line: str, runs: Path, tmp_path: Path, request: pytest.FixtureRequest):
    arguments = shlex.split(line)[1:]
    if "../shared" in line:
        request.getfixturevalue("shared")  # skips where it is absent
        arguments += ["--methods", "smf-kl"]
        runs = tmp_path  # these are none of the demo
    if arguments[0] in ("report", "doctor"):  # of what the commands before it have made
        if not list(runs.glob("lora-*/result.json")):
            demo = [sys.executable, "-m", "smf", "demo", "--methods", "lora", "--output", str(runs), *SMALL]
            subprocess.run(demo, check=True, capture_output=True, timeout=500)
        command = [sys.executable, "-m", "smf", arguments[0], str(runs), *arguments[2:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and "lora" in done.stdout, done.stderr[-2000:]
        return
    if "--output" in arguments:
        del arguments[arguments.index("--output") : arguments.index("--output") + 2]
    if "--methods" not in arguments:
        arguments += ["--methods", "lora"]  # which smf report and smf doctor are then asked about
    command = [sys.executable, "-m", "smf", *arguments, "--output", str(runs), *SMALL]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert arguments[arguments.index("--methods") + 1] in done.stdout


def test_own_analysis_in_the_page_on_measuring_runs(runs: Path, tmp_path: Path, capsys, monkeypatch):
    demo = [sys.executable, "-m", "smf", "demo", "--methods", "lora", "full", "--output", str(runs), *SMALL]
    subprocess.run(demo, check=True, capture_output=True, timeout=500)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(runs)
    (example,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "measuring.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("(")[0] for line in printed[:2]] == ["Estimate", "Estimate"]
    assert printed[2].startswith(("Estimate(", "None")) and 0 <= float(printed[3]) <= 1


def test_train_and_eval_commands_named_in_the_text_run(tmp_path: Path):
    recipe = make_world(tmp_path)
    assert "`smf train RECIPE --method NAME`" in README
    assert "`smf eval RECIPE --patch FILE`" in README
    smf_command = [sys.executable, "-m", "smf"]
    runs = tmp_path / "runs"
    train = [*smf_command, "train", str(recipe), "--method", "smf", "--max-steps", "2", "--output", str(runs)]
    subprocess.run(train, check=True, capture_output=True, timeout=200)
    (patch,) = runs.glob("smf-*/patch.smf")
    done = subprocess.run([*smf_command, "eval", str(recipe), "--patch", str(patch)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "patch.smf" in done.stdout


def headings(page: Path) -> set[str]:
    """GitHub's addresses of the headings of a page."""
    lines = (line for line in page.read_text().splitlines() if line.startswith("#"))
    return {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize(
    "page", [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(((?!http)[^) ]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def test_table_of_the_demo_is_the_committed_result():
    page = (REPO / "docs" / "results" / "demo.md").read_text()
    table = [line for line in README.splitlines() if line in page.splitlines() and line.startswith("|")]
    found = json.loads((REPO / "docs" / "results" / "demo.json").read_text())
    lines = {line.split(" | ")[0].strip("| "): line for line in table}
    for result in [found["base"], *found["methods"]]:
        scores = result["scores_by_seed"]["0"]
        expected = [f"{100 * scores[name]['acc']:.1f}" for name in ("held-out", "seen", "near-domain")]
        expected += [f"{100 * scores['closed-book']['exact_match']:.1f}", f"{scores['general-text']['perplexity']:.3f}"]
        cells = [cell.strip().split("<br>") for cell in lines[result["method"]].strip("|").split(" | ")]
        assert [cell[0] for cell in cells[1:6]] == expected
        if result is not found["base"]:
            assert cells[6][0] == f"{result['overall']['value']:.1f}"
            assert cells[7][0] == f"{result['runs'][0]['rows_changed']:,}"
