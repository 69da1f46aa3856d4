import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import smf
from smf import loop
from smf.base import load_base
from smf.cli import main
from smf.compare import result_path
from smf.errors import ConfigError, DataError, PatchError, SmfError
from smf.methods import attach
from smf.options import Overrides
from smf.prepare import check_output, load
from smf.recipe_file import load_recipe
from smf.summary import summarise
from smf.table import markdown
from smf.train import run_method
from tiny import ONE_THREAD, command, make_base, make_world, write_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a tiny world; its runs are shared by the tests of this module."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_world(tmp_path: Path) -> Path:
    """The recipe of a tiny world that the test may spoil."""
    return make_world(tmp_path)


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), env=ONE_THREAD, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["base", "smf", "smf-all", "smf-healed", "lora", "full"])
def test_every_method_runs_and_reports(world: Path, name: str):
    recipe = load_recipe(world)
    result = run_method(recipe, name)
    scores = result["scores"]
    assert len(scores["exam"]["records"]) == 12 and scores["exam"]["metrics"]["loss"] > 0
    assert scores["stories"]["records"] and scores["stories"]["metrics"]["nats"] > 0
    assert [scores[name]["role"] for name in ("exam", "stories")] == ["target", "probe"]
    assert (result["numbers_changed"] > 0) == (name != "base")
    assert result["trained_parameters"] >= result["numbers_changed"]
    assert (result["rows_changed"] > 0) == name.startswith("smf")
    assert result["provenance"]["versions"]["torch"] and result["peak_memory_mb"] > 0
    folder = result_path(recipe, name).parent
    assert load_recipe(folder / "recipe.toml") == recipe
    if name != "base":
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all(line["grad_norm"] > 0 for line in lines)


def test_finished_run_is_read_not_repeated(world: Path):
    recipe = load_recipe(world)
    run_method(recipe, "smf")
    file = result_path(recipe, "smf")
    before = file.stat().st_mtime_ns
    start = time.perf_counter()
    assert run_method(recipe, "smf")["method"] == "smf"
    assert time.perf_counter() - start < 1 and file.stat().st_mtime_ns == before


def rounded(scores: Any) -> Any:
    """Floats to six digits: the matrix product of few rows depends in its last bits on where the weights lie."""
    if isinstance(scores, dict):
        return {key: rounded(value) for key, value in scores.items()}
    if isinstance(scores, list):
        return [rounded(value) for value in scores]
    return float(f"{scores:.5g}") if isinstance(scores, float) else scores


def test_base_scores_are_those_of_the_memory_disabled(world: Path):
    from smf.evaluate import score

    recipe = load_recipe(world)
    loaded = load(recipe)
    model = attach(load_base(recipe), recipe.methods["smf"], recipe)
    base = run_method(recipe, "base")["scores"]
    with model.disable_adapter():
        again = score(model, loaded.tokenizer, recipe, loaded.scored)
    assert rounded(again) == rounded(base)


def test_saved_patch_and_adapter_score_as_the_run_did(world: Path):
    from smf.train import evaluate_saved

    recipe = load_recipe(world)
    result = run_method(recipe, "smf")
    folder = result_path(recipe, "smf").parent
    base, patched = evaluate_saved(recipe, adapter=None, patch=str(folder / "patch.smf"))
    assert rounded(base["scores"]) == rounded(run_method(recipe, "base")["scores"])
    assert rounded(patched["scores"]) == rounded(result["scores"]) != rounded(base["scores"])
    assert patched["rows_changed"] == result["rows_changed"]
    for path in (folder, folder / "adapter"):  # whatever else smf.open_patch takes
        opened = evaluate_saved(recipe, adapter=None, patch=str(path))[1]
        assert opened["scores"] == patched["scores"] and opened["method"] == path.name
        assert opened["rows_changed"] == result["rows_changed"]
    adapted = evaluate_saved(recipe, adapter=str(folder / "adapter"), patch=None)[1]
    assert rounded(adapted["scores"]) == rounded(result["scores"])


def test_all_methods_see_the_same_examples_in_the_same_order(world: Path, monkeypatch: pytest.MonkeyPatch):
    import smf.loop as loop

    recipe = load_recipe(world, output=str(world.parent / "order"))
    seen: dict[str, list[str]] = {}
    real = loop.RunTrainer

    class Spy(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            collate = self.data_collator

            def spy(examples):
                seen.setdefault(current, []).extend(e.id for e in examples)
                return collate(examples)

            self.data_collator = spy

    monkeypatch.setattr(loop, "RunTrainer", Spy)
    for current in ("smf", "lora", "full"):
        run_method(recipe, current)
    assert len(seen["smf"]) == 32
    assert seen["smf"] == seen["lora"] == seen["full"]


def test_accumulation_changes_neither_rows_nor_scores_much(world: Path):
    recipe = load_recipe(world, output=str(world.parent / "accumulation"))
    whole = replace(recipe, train=replace(recipe.train, micro_batch_size=8))
    a, b = run_method(recipe, "smf"), run_method(whole, "smf")
    assert a["rows_changed"] == b["rows_changed"]
    assert a["scores"]["exam"]["metrics"]["loss"] == pytest.approx(b["scores"]["exam"]["metrics"]["loss"], abs=1e-4)


def test_full_text_loss_differs_from_answer_loss(world: Path):
    recipe = load_recipe(world, output=str(world.parent / "full-text"))
    full = replace(recipe, train=replace(recipe.train, loss="full"))
    answer, whole = (run_method(r, "full")["scores"]["exam"]["metrics"]["loss"] for r in (recipe, full))
    assert answer != whole


def test_one_process_trains_on_one_of_several_gpus(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trainer by itself takes all of them, and a micro-batch for each."""

    class OnFourGpus(loop.TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr(loop, "TrainingArguments", OnFourGpus)
    recipe = load_recipe(world)
    arguments = loop._arguments(recipe, tmp_path, 4, 1.0)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == recipe.train.micro_batch_size


@pytest.mark.slow
def test_train_command_under_torchrun_gives_the_rows_of_one_process(own_world: Path, tmp_path: Path):
    recipe = load_recipe(own_world, output=str(tmp_path / "one"))
    one = run_method(recipe, "smf")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "smf"]
    arguments = ["train", str(own_world), "--method", "smf", "--output", str(tmp_path / "two")]
    done = subprocess.run([*launch, *arguments], env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(result_path(replace(recipe, output=str(tmp_path / "two")), "smf").read_text())
    patches = [smf.load_patch(tmp_path / f / recipe.run_id("smf") / "patch.smf") for f in ("one", "two")]
    assert all(torch.equal(patches[0].rows[layer], patches[1].rows[layer]) for layer in patches[0].rows)
    assert two["scores"]["exam"]["metrics"]["loss"] == pytest.approx(one["scores"]["exam"]["metrics"]["loss"], abs=1e-4)


# -- the command ------------------------------------------------------------------------------------------------------


def test_compare_prints_tables_and_runs_only_what_is_missing(own_world: Path):
    first = run("compare", own_world, "--methods", "base", "smf", "--max-steps", 2)
    assert first.returncode == 0, first.stderr[-2000:]
    for word in ("base", "smf", "exam loss", "exam %", "stories ppl", "rows changed", "peak MB"):
        assert word in first.stdout
    output = Path(f"{load_recipe(own_world).output}-trial")
    assert "(trial: 2 steps)" in first.stdout and "(trial: 2 steps)" in (output / "report.html").read_text()
    table = (output / "table.md").read_text()
    scores = table.split("\n\n")[0]
    assert scores.count("\n| ") == 3 and "| smf |" in scores and "over examples only (one seed)" in table
    assert (output / "report.html").is_file()
    first_summary = json.loads((output / "summary.json").read_text())
    assert [r["method"] for r in (first_summary["base"], *first_summary["methods"])] == ["base", "smf"]
    assert "records" not in json.dumps(first_summary)
    again = run("compare", own_world, "--methods", "base", "smf", "--max-steps", 2)
    assert again.stdout == first.stdout and "smf, lr 0.05, seed 0 (2 of 2): finished, kept" in again.stderr


def test_failing_method_leaves_the_others_results_and_is_named(own_world: Path):
    recipe = load_recipe(own_world)
    folder = Path(recipe.output) / recipe.run_id("lora")
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the run's folder should be")
    done = run("compare", own_world, "--methods", "lora", "base")
    assert done.returncode == 2 and "did not finish: ['lora, lr 0.01, seed 0']" in done.stderr
    assert result_path(recipe, "base").is_file()


def test_errors_of_ours_are_one_line_without_traceback(own_world: Path):
    done = run("compare", own_world, "--base", "/nowhere/model")
    assert done.returncode == 2
    assert (
        "smf: error: base = '/nowhere/model': there is no model folder" in done.stderr
        and "Traceback" not in done.stderr
    )


def help_of(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *command: str) -> str:
    monkeypatch.setattr(sys, "argv", ["smf", *command, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"limit": 0}, ""),
        ({"max_steps": 1}, " (trial: 1 step)"),
        ({"max_steps": 20, "limit": 20}, " (trial: 20 steps, first 20 rows of each set)"),
    ],
)
def test_a_trial_says_how_much_it_is_of(options: dict[str, Any], said: str):
    assert Overrides(**options).trial() == said


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    text = help_of(capsys, monkeypatch)
    assert all(word in text for word in ("demo", "compare", "tune", "train", "eval"))
    text = help_of(capsys, monkeypatch, "compare")
    assert all(option in text for option in ("--methods", "--base", "--data", "--output", "--seed", "--max-steps"))


# -- refused before training ------------------------------------------------------------------------------------------


def edited(world: Path, old: str, new: str) -> Path:
    text = world.read_text()
    lines = (world.parent / "data" / "eval.jsonl").read_text().splitlines(keepends=True)
    (world.parent / "data" / "twice.jsonl").write_text("".join([*lines, lines[1]]))
    assert old in text
    world.write_text(text.replace(old, new))
    return world


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("layers = [1, 2]", "layers = [1, 9]", SmfError, "layer index 9 is out of range: the model has 4"),
        ("layers = [1, 2]", "layers = [1, -5]", SmfError, "layer index -5 is out of range: the model has 4"),
        (
            "n_keys = 16\nheads = 2\nknn = 4\nk_dim = 16",
            "n_keys = 16\nheads = 2\nknn = 4\nk_dim = 15",
            ConfigError,
            "k_dim",
        ),
        ("n_keys = 16", "n_keys = 3", ConfigError, "knn=4"),
        ("max_length = 64", "max_length = 12", DataError, "cut away"),
        ('path = "train.jsonl"', 'path = "stories.jsonl"', DataError, "no column 'id'"),
        ('path = "eval.jsonl"', 'path = "train.jsonl"', DataError, "both trained and scored"),
        ('path = "eval.jsonl"', 'path = "twice.jsonl"', DataError, "1 ids stand there twice, such as 'q41'"),
        (
            'metrics = ["loss", "acc"]',
            'metrics = ["f1"]',
            ConfigError,
            "medmcqa' has ['acc', 'answer_norm', 'letter', 'loss']",
        ),
        ('eval.exam = { path = "eval.jsonl" }', "", ConfigError, "no [target.eval.NAME]"),
        ('task = "medmcqa"', 'task = "medqa"', ConfigError, "'medqa' is not known"),
        ('task = "medmcqa"', 'task = "perplexity"', ConfigError, "not a target"),
        ('part = "probe"', 'part = "prob"', DataError, "rows has part 'prob'"),
        ('rule = "tfidf"', 'rule = "idf"', ConfigError, "'idf' is not known"),
        (
            "rows_per_step = 8\nlr = 0.05\n\n[methods.smf-all]",
            "rows_per_step = 0\nlr = 1.0\n\n[methods.smf-all]",
            ConfigError,
            "rows_per_step",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name_before_training(own_world, old, new, error, message):
    with pytest.raises(error, match=message.replace("[", r"\[")):
        load(load_recipe(edited(own_world, old, new)))


def test_explanations_need_their_column(own_world: Path):
    lines = (own_world.parent / "data" / "train.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k != "exp"} for line in lines]
    write_lines(own_world.parent / "data" / "train.jsonl", rows)
    assert load(load_recipe(own_world)).train
    with pytest.raises(DataError, match=r"train\.jsonl has no column 'exp'"):
        load(load_recipe(edited(own_world, "explanation = false", "explanation = true")))


def test_missing_adapter_is_refused_before_the_base_is_scored(own_world: Path):
    from smf.train import evaluate_saved

    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        evaluate_saved(load_recipe(own_world), adapter="/nowhere", patch=None)


@pytest.mark.parametrize(("name", "folder", "end"), [("smf", "adapter", "values"), ("lora", "model", "lora_B.weight")])
def test_an_adapter_in_part_or_without_numbers_is_refused(
    world: Path, tmp_path: Path, name: str, folder: str, end: str
):
    """Of PEFT's other methods too, which go on to be scored where they are whole."""
    from smf.train import evaluate_saved

    recipe = load_recipe(world)
    result = run_method(recipe, name)
    adapter = shutil.copytree(result_path(recipe, name).parent / folder, tmp_path / "adapter")
    assert rounded(evaluate_saved(recipe, adapter=str(adapter), patch=None)[1]["scores"]) == rounded(result["scores"])
    whole = load_file(adapter / "adapter_model.safetensors")
    last = next(key for key in reversed(whole) if key.endswith(end))
    damaged = {"part": {key: tensor for key, tensor in whole.items() if key != last}}
    damaged |= {str(x): whole | {last: torch.full_like(whole[last], x)} for x in (float("nan"), float("-inf"))}
    for tensors in damaged.values():
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SmfError, match=end.partition(".")[0]):
            evaluate_saved(recipe, adapter=str(adapter), patch=None)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 10**6}, "rank 1,000,000, its tensors no side"),
    "rank of some": ({"rank_pattern": {"q_proj": 10**6}}, "rank 1,000,000, its tensors no side"),
    "layers": ({"layer_replication": [[0, 2]] * 200}, "layer_replication repeats layers"),
    "alpha": ({"lora_alpha": float("inf")}, "not JSON compliant"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_adapter_whose_configuration_asks_for_more_than_it_has_is_refused(world: Path, tmp_path: Path, what: str):
    """Before PEFT makes what it asks for."""
    from smf.train import evaluate_saved

    recipe = load_recipe(world)
    run_method(recipe, "lora")
    adapter = shutil.copytree(result_path(recipe, "lora").parent / "model", tmp_path / "adapter")
    changes, message = HOSTILE[what]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=message):
        evaluate_saved(recipe, adapter=str(adapter), patch=None)


def test_patch_of_another_base_is_refused_as_that(world: Path, tmp_path: Path):
    """And not for the layers that the other base does not have."""
    from smf.train import evaluate_saved

    recipe = load_recipe(world)
    run_method(recipe, "smf")
    shutil.copytree(recipe.base, tmp_path / "other")
    config = LlamaConfig.from_pretrained(recipe.base, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    patch = result_path(recipe, "smf").parent / "patch.smf"
    with pytest.raises(PatchError, match="the patch belongs to another base"):
        evaluate_saved(replace(recipe, base=str(tmp_path / "other")), adapter=None, patch=str(patch))


def test_unwritable_output_is_refused(own_world: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_output(tmp_path / "file" / "runs")


def test_unknown_method_is_refused_with_the_known_ones(own_world: Path):
    with pytest.raises(ConfigError, match=r"no \[methods.smff\]; its methods: \['base'"):
        run_method(load_recipe(own_world), "smff")


def test_adapter_of_another_base_is_refused(own_world: Path, tmp_path: Path):
    from smf.train import evaluate_saved

    recipe = load_recipe(own_world)
    run_method(recipe, "smf")
    folder = result_path(recipe, "smf").parent
    make_base(seed=7).save_pretrained(tmp_path / "other")
    (tmp_path / "base" / "tokenizer.json").rename(tmp_path / "other" / "tokenizer.json")
    (tmp_path / "base" / "tokenizer_config.json").rename(tmp_path / "other" / "tokenizer_config.json")
    other = load_recipe(own_world, base=str(tmp_path / "other"))
    with pytest.raises(SmfError, match="another base"):
        evaluate_saved(other, adapter=str(folder / "adapter"), patch=None)
    with pytest.raises(SmfError, match="another base"):
        evaluate_saved(other, adapter=None, patch=str(folder / "patch.smf"))


def test_table_shows_the_change_against_the_base(world: Path):
    recipe = load_recipe(world)
    results = [run_method(recipe, name) for name in ("base", "full")]
    change = results[1]["scores"]["exam"]["metrics"]["loss"] - results[0]["scores"]["exam"]["metrics"]["loss"]
    assert f"<br>{change:+.3f}<br>[" in markdown(summarise(results, ["loss"]))


def test_blank_texts_do_not_become_background_documents(own_world: Path):
    stories = own_world.parent / "data" / "stories.jsonl"
    rows = [json.loads(line) for line in stories.read_text().splitlines()]
    write_lines(stories, [*rows, {"text": "   "}])
    assert all(text.strip() for text in load(load_recipe(own_world)).background)


def test_provenance_of_a_run(world: Path, own_world: Path):
    """A recipe's patch knows its examples by their ids, and is otherwise the same; a resumed one is the same too."""
    plain = load_recipe(world)
    replay = '\n[replay]\nsource = { path = "stories.jsonl", part = "healing" }\n\n[methods.known]\nkind = "smf"\n'
    replay += 'reads = "gradient"\nrows_per_step = 8\nlr = 0.05\nprovenance = true\n'
    own_world.write_text(own_world.read_text() + replay + '\n[methods.mixed]\nkind = "smf"\nrule = "all"\nlr = 0.05\n')
    own_world.write_text(own_world.read_text() + "provenance = true\nreplay = 0.25\n")
    recipe = load_recipe(own_world)
    run_method(plain, "smf"), run_method(recipe, "known"), run_method(recipe, "mixed")
    blind = smf.load_patch(result_path(plain, "smf").parent / "patch.smf")
    known = smf.open_patch(result_path(recipe, "known").parent)
    assert all(torch.equal(known.rows[layer], rows) for layer, rows in blind.rows.items())
    assert all(torch.equal(known.new[layer], new) for layer, new in blind.new.items())
    assert blind.provenance is None and known.provenance is not None
    everyone = [f"q{number}" for number in range(40)]  # of whom 32 were trained, in four steps of eight
    assert len(known.provenance.names) == 32 and set(known.provenance.names) < set(everyone)
    assert all(int(counts.min()) >= 1 for counts in known.provenance.counts.values())
    mixed = smf.open_patch(result_path(recipe, "mixed").parent)
    writers = {name for row in mixed.rows[1].tolist() for name in mixed.why(1, row)}
    assert any(name.startswith("replay ") for name in writers) and any(name.startswith("q") for name in writers)


def test_a_key_added_later_leaves_the_names_of_runs(world: Path):
    recipe = load_recipe(world)
    method = recipe.methods["smf"]
    renamed = replace(recipe, methods=recipe.methods | {"smf": replace(method, provenance=True)})
    assert renamed.run_id("smf") != recipe.run_id("smf")
    before = load_recipe("world_study.toml")
    assert before.run_id("base") == "base-4ffe00e6e1"  # a run of 2026-11-22, before methods had `provenance`
