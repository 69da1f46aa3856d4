"""Recipes whose base and data are on the hub, from a folder in the layout of its cache; and dry runs of them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

import smf.train
from smf.data import Loaded
from smf.errors import ConfigError
from smf.prepare import load
from smf.recipe import sources
from smf.recipe_file import SHIPPED, load_recipe
from smf.sources import resolved
from tiny import make_world

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: validation, path: validation.jsonl}
  - {split: rates, path: rates.jsonl}
---
"""
HASHES = {"models--tiny--base": "a" * 40, "datasets--tiny--exam": "b" * 40, "datasets--tiny--stories": "c" * 40}


def on_hub(recipe: str, folder: Path) -> str:
    """The tiny world's recipe, with names of the hub in place of its files."""
    splits = {"train": "train", "validation": "rates", "eval": "validation"}  # by file
    for file, split in splits.items():
        recipe = recipe.replace(f'path = "{file}.jsonl"', f'hub = "tiny/exam", split = "{split}"')
    recipe = recipe.replace('path = "stories.jsonl"', 'hub = "tiny/stories"')
    return recipe.replace(f'"{folder}/base"', '"tiny/base"').replace(f'"{folder}/data"', '"hub"')


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub with a base and two data sets, and a recipe that names them."""
    folder = tmp_path_factory.mktemp("hub")
    recipe = make_world(folder)
    cache = folder / "home" / "hub"
    for name, commit in HASHES.items():
        snapshot = cache / name / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (cache / name / "refs").mkdir()
        (cache / name / "refs" / "main").write_text(commit)
    shutil.copytree(folder / "base", cache / "models--tiny--base" / "snapshots" / ("a" * 40), dirs_exist_ok=True)
    exam = cache / "datasets--tiny--exam" / "snapshots" / ("b" * 40)
    shutil.copy(folder / "data" / "train.jsonl", exam / "train.jsonl")
    shutil.copy(folder / "data" / "eval.jsonl", exam / "validation.jsonl")
    shutil.copy(folder / "data" / "validation.jsonl", exam / "rates.jsonl")
    (exam / "README.md").write_text(CARD)
    stories = cache / "datasets--tiny--stories" / "snapshots" / ("c" * 40)
    shutil.copy(folder / "data" / "stories.jsonl", stories / "train.jsonl")
    recipe.write_text(on_hub(recipe.read_text(), folder))
    return folder


def command(hub: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(hub / "home"), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"):
        environment.pop(name, None)
    line = [sys.executable, "-m", "smf", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


def test_base_and_data_come_from_the_hub_and_their_hashes_are_kept(hub: Path):
    done = command(hub, "compare", str(hub / "recipe.toml"), "--methods", "smf")
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (hub / "runs").glob("smf-*/result.json")
    revisions = json.loads(file.read_text())["provenance"]["revisions"]
    assert revisions == {"tiny/base": "a" * 40, "tiny/exam": "b" * 40, "tiny/stories": "c" * 40}


def test_what_the_cache_does_not_have_is_named(hub: Path):
    done = command(
        hub, "compare", str(hub / "recipe.toml"), "--set", 'target.train.revision="v2"', "--output", "/tmp/x"
    )
    assert done.returncode == 2 and "tiny/exam (train, revision v2) cannot be loaded" in done.stderr
    done = command(hub, "compare", str(hub / "recipe.toml"), "--base", "tiny/other")
    assert done.returncode == 2 and "base = 'tiny/other' cannot be loaded" in done.stderr


def test_what_is_recorded_is_what_was_loaded_though_branches_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = make_world(tmp_path)
    recipe.write_text(on_hub(recipe.read_text(), tmp_path).replace('"tiny/base"', f'"{tmp_path}/base"'))
    moves, read, json_lines = itertools.count(), [], datasets.load_dataset

    def info(_: Any, name: str, *, repo_type: str, revision: str) -> Any:
        return SimpleNamespace(sha=f"{name} {revision} {next(moves)}")

    def rows(name: str, _: Any, *, split: str, revision: str) -> Any:
        read.append(revision)
        file = {"rates": "validation", "validation": "eval"}.get(split, "train") if name == "tiny/exam" else "stories"
        return json_lines("json", data_files=f"{tmp_path}/data/{file}.jsonl", split="train")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", info)
    monkeypatch.setattr("datasets.load_dataset", rows)
    resolved.cache_clear()
    loaded = load(load_recipe(recipe, ['target.eval.exam.revision="v1"']))
    resolved.cache_clear()
    assert set(loaded.revisions) == {"tiny/exam@main", "tiny/exam@v1", "tiny/stories"}
    assert set(read) == set(loaded.revisions.values())


def test_runs_load_the_base_at_the_commit_that_was_recorded(hub: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smf.train.load_base", lambda recipe: recipe.revision)
    recipe, loaded = load_recipe(hub / "recipe.toml"), Loaded(None, [], {}, [], [], [], {"tiny/base": "a" * 40})
    assert smf.train._base(recipe, loaded) == "a" * 40
    assert smf.train._base(replace(recipe, base="a folder"), loaded) == "main"


# -- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_of_the_hub_says_what_it_could_not_check(hub: Path):
    done = command(hub, "compare", str(hub / "recipe.toml"), "--dry-run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LlamaForCausalLM" in done.stdout and "8 of 256 rows, 2 layers" in done.stdout
    assert "it is on the hub" not in done.stdout and " 40 " in done.stdout  # rows of the hub's cache are counted
    settings = ["--set", 'target.train.revision="v2"']
    done = command(hub, "compare", str(hub / "recipe.toml"), "--dry-run", *settings)
    assert "[target.train] tiny/exam (train), revision v2: it is on the hub, not in its cache" in done.stdout
    done = command(hub, "compare", str(hub / "recipe.toml"), "--dry-run", "--base", "tiny/other")
    assert done.returncode == 0 and "the base tiny/other is on the hub and not in its cache" in done.stdout


def test_a_dry_run_of_local_files_counts_and_checks_them(tmp_path: Path):
    recipe = make_world(tmp_path)
    done = command(tmp_path, "compare", str(recipe), "--dry-run")
    assert done.returncode == 0, done.stderr[-2000:]
    for said in ("train.jsonl", "at most", "heal.source", "8 of 256 rows", "numbers that train", "<eos>"):
        assert said in done.stdout, said
    assert not list((tmp_path / "runs").glob("*/result.json"))
    (tmp_path / "data" / "eval.jsonl").unlink()
    settings = ["--set", "train.max_length=12", "memory.layers=[1,9]", "probes.stories.source.column='story'"]
    done = command(tmp_path, "compare", str(recipe), "--dry-run", *settings)
    assert done.returncode == 2
    for said in ("no data file at", "is cut away", "layer index 9", "has no column 'story'", "would stop this run"):
        assert said in done.stdout + done.stderr, said


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_says_where_each_set_is_on_the_hub_and_below_a_folder(path: Path):
    recipe = load_recipe(path)
    for name, source in sources(recipe).items():
        assert source.path, name
        assert source.hub or recipe.data == "world" or path.stem == "your_data", name


# -- names of runs ----------------------------------------------------------------------------------------------------


def test_keys_that_were_added_later_do_not_rename_runs_that_leave_them_out(tmp_path: Path):
    recipe = make_world(tmp_path)
    names = {recipe_name(recipe, setting) for setting in ((), ("train.examples=0",), ("target.recall=false",))}
    assert len(names) == 1
    assert load_recipe("world_study.toml").comparison_id() == "db434fba9b"  # as docs/results has it
    for setting in ("train.examples=5", "target.recall=true", "target.train.min_chars=3", "target.train.sample=3"):
        assert recipe_name(recipe, (setting,)) not in names


def recipe_name(path: Path, settings: tuple[str, ...]) -> str:
    return load_recipe(path, settings).run_id("smf")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_replace_keys_however_deep(tmp_path: Path):
    recipe = make_world(tmp_path)
    found = load_recipe(recipe, ["train.max_length=32", 'memory={n_keys=8, init="paper"}', "methods.lora.lr=3e-3"])
    assert found.train.max_length == 32 and found.methods["lora"].lr == 3e-3
    assert (found.memory.n_keys, found.memory.init, found.memory.heads) == (8, "paper", 2)
    chosen = 'target.train.where={choice_type=["single"]}'
    assert load_recipe(recipe, [chosen]).target.train.where == {"choice_type": ["single"]}
    assert load_recipe(recipe, [chosen, "target.train.where={}"]).target.train.where == {}  # empties a table


def test_texts_in_settings_need_no_quotes_and_other_values_are_toml(tmp_path: Path):
    recipe = make_world(tmp_path)
    found = load_recipe(recipe, ["target.train.path=a b.jsonl", "methods.smf.rule=tf", "probes.stories.source.part= x"])
    assert found.target.train.path == "a b.jsonl" and found.methods["smf"].rule == "tf"
    assert found.probes["stories"].source.part == "x" and found.methods["smf"].lr == 0.05
    assert load_recipe(recipe, ["target.validation.split=v", "lm_eval_tasks=t#1"]).lm_eval_tasks == "t#1"
    for setting in ("train.max_length=abc", "target.train=x.jsonl", "memory.layers=[0,", "nothing", "a.b.c=d", "="):
        with pytest.raises(ConfigError, match=re.escape(f"--set {setting!r} is not TOML: ")) as raised:
            load_recipe(recipe, [setting])
        assert '="TEXT"\' for a text' in str(raised.value)


@pytest.mark.parametrize("setting", ["methods.smg.lr=1.0", "methods={smg={lr=1.0}}"])
def test_settings_change_methods_that_there_are_and_make_whole_ones_only(setting: str, tmp_path: Path):
    recipe = make_world(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no method 'smg'; did you mean 'smf'\?.*A new one needs its kind"):
        load_recipe(recipe, [setting])
    new = load_recipe(recipe, ['methods.new={kind="lora", lr=0.5}', "methods.new.lr=0.25"]).methods["new"]
    assert (new.kind, new.lr) == ("lora", 0.25)
