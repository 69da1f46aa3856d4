"""The demo on the embedded world, as the command runs it: a few steps in the fast tier, all of it in the slow one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smf.recipe_file import load_recipe

REPO = Path(__file__).parents[1]
METHODS = ["base", "late-rows", "late-rows-gentle", "smf-kl", "smf-tfidf", "lora", "full"]


def demo(folder: Path, *arguments: object, timeout: int = 500) -> subprocess.CompletedProcess:
    """Run it where no network can be reached, and nothing says that there is none."""
    command = [sys.executable, "-m", "smf", "demo", "--output", str(folder), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Each method's headline scores."""
    summary = json.loads((folder / "summary.json").read_text())
    headlines = ("acc", "exact_match", "perplexity")
    return {
        method["method"]: {
            name: next(scores[key] for key in headlines if key in scores)
            for name, scores in method["scores_by_seed"]["0"].items()
        }
        for method in (summary["base"], *summary["methods"])
    }


def check_base(base: dict[str, float]) -> None:
    assert abs(base["held-out"] - 0.25) <= 0.03 and abs(base["seen"] - 0.25) <= 0.03
    assert base["near-domain"] >= 0.90 and base["closed-book"] >= 0.95
    assert base["general-text"] < 3


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder, "--max-steps", 2, "--methods", "smf-kl")


def test_recipe_of_the_demo_has_what_it_promises():
    recipe = load_recipe("demo.toml")
    assert list(recipe.methods) == METHODS
    assert 200 <= recipe.train.steps <= 250
    assert (recipe.base, recipe.data) == ("world", "world")


def test_short_demo_scores_the_base_as_promised(short_demo):
    check_base(metrics(short_demo[0])["base"])


def test_short_demo_prints_the_table_and_writes_the_report(short_demo):
    folder, done = short_demo
    for words in ("held-out", "seen", "near-domain", "closed-book", "general-text", "rows changed", "peak MB", "95 %"):
        assert words in done.stdout
    page = (folder / "report.html").read_text()
    assert "smf-kl" in page and "Learning against forgetting" in page


def test_finished_demo_answers_at_once(short_demo):
    folder, done = short_demo
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    again = demo(folder, "--max-steps", 2, "--methods", "smf-kl")
    lines = [line for line in again.stderr.splitlines() if line.startswith("smf:") and "a trial of" not in line]
    assert len(lines) == 2 and all("finished, kept" in line for line in lines)  # nothing is loaded, run or scored
    assert again.stdout == done.stdout
    assert files == {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}


def test_every_method_of_the_demo_trains(tmp_path: Path):
    demo(tmp_path, "--max-steps", 2, "--limit", 20)
    assert list(metrics(tmp_path)) == METHODS


def test_limit_and_steps_are_checked(tmp_path: Path):
    for option in ("--limit", "--max-steps"):
        command = [sys.executable, "-m", "smf", "demo", "--output", str(tmp_path), option, "-1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and f"{option} must be at least" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("study", ["world_study.toml", "late_rows.toml"])
def test_every_method_of_the_study_trains(study: str, tmp_path: Path):
    recipe = load_recipe(study, output=str(tmp_path))
    command = [sys.executable, "-m", "smf", "compare", study, "--output", str(tmp_path)]
    command += ["--format", "json", "--max-steps", "2", "--limit", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = json.loads(done.stdout)
    assert [method["method"] for method in shown["methods"]] == [name for name in recipe.methods if name != "base"]
    assert shown["matched"] and shown["comparisons"]


@pytest.mark.slow
def test_whole_demo(tmp_path: Path):
    demo(tmp_path, timeout=3600)
    scores = metrics(tmp_path)
    check_base(scores["base"])
    lost = {name: scores["base"][name] - scores["full"][name] for name in ("near-domain", "closed-book")}
    assert max(lost.values()) >= 0.15  # else there is nothing to show
    for name in METHODS[1:]:
        assert scores[name]["seen"] > scores["base"]["seen"] + 0.1, name
    # what we recommend gains more than full finetuning, and forgets a twentieth of it at most
    for name in ("late-rows", "late-rows-gentle"):
        assert scores[name]["held-out"] > scores["full"]["held-out"]
        assert all(scores["base"][probe] - scores[name][probe] <= lost[probe] / 20 for probe in lost)


@pytest.mark.slow
def test_base_on_every_item(tmp_path: Path):
    demo(tmp_path, "--limit", 0, "--methods", "base", timeout=1800)
    check_base(metrics(tmp_path)["base"])


@pytest.mark.slow
def test_make_demo_needs_no_more_than_a_clone(tmp_path: Path):
    """`make demo` as the README has it, but for its length: it makes .venv itself."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(REPO), str(clone)], check=True)
    command = ["make", "demo", "OPTIONS=--max-steps 2 --limit 10"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(name in done.stdout for name in METHODS)
    assert (clone / "runs" / "demo" / "report.html").is_file()
