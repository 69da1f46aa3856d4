"""What is said of a base before training, and of a run when it is shared."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import fakes
import smf
from fakes import answers, choices, text, write
from smf.card import model_card, push_to_hub
from smf.compare import compare, result_path
from smf.doubts import doubts
from smf.errors import ConfigError, TrainingError
from smf.jobs import Job
from smf.recipe_file import load_recipe
from smf.train import run_method
from tiny import make_world

# -- doubts about the base --------------------------------------------------------------------------------------------


def asked(role: str, share: float, n: int = 200, count: int = 4) -> dict[str, Any]:
    found = choices(role, answers(share, n=n))
    for record in found["records"]:
        record["logprobs"] = [0.0] * count
    return found


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (asked("target", 0.96), "already solves the target 'set' (acc 0.96)"),
        (asked("target", 0.9), ""),
        (asked("probe", 0.27), "answers the probe 'set' by chance (acc 0.27)"),
        (asked("probe", 0.4), ""),
        (asked("probe", 0.4, n=60), ""),
        (asked("probe", 0.4, n=10), "by chance"),  # of ten questions, four are no sign
        (asked("probe", 0.52, count=2), "by chance"),
        (asked("target", 0.27), ""),
        (text(3.0), ""),
    ],
)
def test_a_target_that_is_known_and_a_probe_that_is_not_are_named(score, said):
    found = doubts({"set": score})
    assert len(found) == bool(said) and said in "".join(found)


def test_a_generated_probe_without_a_right_answer_is_by_chance():
    score = {"role": "probe", "task": "closed_book", "metrics": {"exact_match": 0.0, "f1": 0.1}, "records": [{"id": 1}]}
    assert "by chance (exact_match 0.00)" in doubts({"set": score})[0]
    assert doubts({"set": score | {"metrics": {"exact_match": 0.01}}}) == []
    known = {"role": "target", "task": "responses", "metrics": {"loss": 0.01}, "records": []}
    assert "already knows the target 'set' (0.010 nats" in doubts({"set": known})[0]


def test_a_set_is_judged_by_the_score_that_tables_show():
    def of(role: str, task: str, **metrics: float) -> dict[str, Any]:
        return {"set": {"role": role, "task": task, "metrics": metrics, "records": [{"id": 1}]}}

    assert doubts(of("probe", "triviaqa", alias=0.25, exact_match=0.0, f1=0.1)) == []
    (said,) = doubts(of("probe", "triviaqa", alias=0.0, exact_match=0.0, f1=0.0))
    assert "by chance (alias 0.00)" in said
    (said,) = doubts(of("target", "triviaqa", alias=0.99, exact_match=0.3, f1=0.5))
    assert "already solves the target 'set' (alias 0.99)" in said
    (said,) = doubts(of("probe", "perplexity", nats=11.9, perplexity=150_000), 151_936)
    assert "reads the probe 'set' by chance (11.90 nats per token; guessing among its 151,936 tokens" in said
    assert doubts(of("probe", "gsm8k_loss", loss=11.9, perplexity=150_000)) and not doubts(
        of("probe", "wikitext", nats=4)
    )
    assert doubts(of("divergence", "divergence", nats=11.9)) == []


def test_what_the_bases_scores_say_is_warned_of_before_a_method_trains(tmp_path: Path, capsys, monkeypatch):
    recipe = load_recipe(make_world(tmp_path), ['methods.other={kind="lora", lr=0.1}'])
    scores = {"exam": choices("target", [1] * 20), "trivia": choices("probe", [0] * 20)}

    def run_jobs(jobs: list[Job], at_once: int) -> None:
        for job in jobs:
            print(f"ran {job.title.split(',')[0]}", file=sys.stderr)
            if job.title.startswith("base"):
                write(job.log.parent, fakes.result("base", scores, kind="base"))

    monkeypatch.setattr("smf.compare.run_jobs", run_jobs)
    with pytest.raises(TrainingError, match="did not finish"):
        compare(recipe, ["other"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("ran", "smf: warning"))]
    assert [line.split(" (")[0] for line in said] == [
        "ran base",
        "smf: warning: the base already solves the target 'exam'",
        "smf: warning: the base answers the probe 'trivia' by chance",
        "ran other",
    ]


# -- sharing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import make_world

    recipe = load_recipe(make_world(tmp_path_factory.mktemp("world")))
    for name in ("base", "smf", "lora"):
        run_method(recipe, name)
    return result_path(recipe, "smf").parent


def test_the_card_has_scores_forgetting_with_intervals_and_how_to_load(run: Path):
    card = model_card(run, "someone/my-memory")
    found = json.loads((run / "result.json").read_text())
    assert "# my-memory" in card and "library_name: peft" in card and "- sparse-memory-finetuning" in card
    assert f"{found['rows_changed']:,} rows of the memory changed" in card
    assert "| base |" in card and "| smf |" in card and "exam" in card and "stories" in card
    assert "95 % interval over examples only (one seed)" in card and "<br>[" in card
    assert "import smf" in card and "PeftModel.from_pretrained(base, 'someone/my-memory')" in card
    assert "hf_hub_download('someone/my-memory', \"patch.smf\")" in card
    assert f"torch {found['provenance']['versions']['torch']}" in card and "smf train recipe.toml --method smf" in card


def test_what_is_uploaded_loads_again_and_names_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import huggingface_hub
    from peft import PeftModel

    calls = []

    class Hub:
        def __init__(self, token: str | None):
            calls.append(token)

        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append((repo, options))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / "there")
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    address = push_to_hub(run, "someone/my-memory", token="secret")
    assert address.endswith("someone/my-memory/commit/1")
    assert calls == ["secret", ("someone/my-memory", {"private": True, "exist_ok": True})]
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "patch.smf", "recipe.toml"}
    assert (tmp_path / "there" / "README.md").read_text() == model_card(run, "someone/my-memory")
    assert "secret" not in (tmp_path / "there" / "README.md").read_text()
    said = capsys.readouterr().err
    assert f"smf: warning: the base is a folder of this machine ({run.parents[1]}/base)" in said
    texts = [(tmp_path / "there" / name).read_text() for name in ("README.md", "recipe.toml", "adapter_config.json")]
    assert not [text for text in texts if str(run.parents[1]) in text]
    assert 'from_pretrained("base")' in texts[0] and 'base = "base"' in texts[1] and '"base"' in texts[2]
    recipe = load_recipe(run / "recipe.toml")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipe.base), tmp_path / "there")
    patch = smf.load_patch(tmp_path / "there" / "patch.smf")
    patch.revert(model)  # its rows are those of the adapter
    assert sum(len(rows) for rows in patch.rows.values()) > 0


def test_the_card_loads_the_base_that_it_belongs_to(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    written = (run / "recipe.toml").read_text()

    def loader(base: str) -> str:
        line = next(line for line in written.splitlines() if line.startswith("base = "))
        (tmp_path / "run" / "recipe.toml").write_text(written.replace(line, f'base = "{base}"'))
        return model_card(tmp_path / "run", "a/b").split("from transformers import AutoModelForCausalLM\n")[1]

    lines = loader("world").partition("model = ")[0]
    names: dict[str, Any] = {"AutoModelForCausalLM": AutoModelForCausalLM}
    exec(lines, names)  # what the card says loads
    assert names["base"].config.vocab_size > 0 and "world.BASE" in lines
    assert "from_pretrained('tiny/base', revision='main')" in loader("tiny/base")


def test_what_is_no_finished_run_of_a_memory_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="not the folder of a finished run"):
        model_card(tmp_path, "a/b")
    (lora,) = run.parent.glob("lora-*")
    with pytest.raises(ConfigError, match="has no adapter: only runs of a memory"):
        push_to_hub(lora, "a/b")
