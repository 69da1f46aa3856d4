import dataclasses
import json
import re
from pathlib import Path

import pytest

from smf.errors import ConfigError
from smf.loop import steps_of
from smf.recipe import limited, shortened
from smf.recipe_file import SHIPPED, find_recipe, load_recipe, to_toml
from smf.sources import load_rows
from tiny import RECIPE, make_world


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(folder=tmp_path))
    return file


def changed(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def test_written_out_recipe_reads_back_equal(recipe_file: Path):
    recipe = load_recipe(recipe_file, seed=3)
    (recipe_file.parent / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(recipe_file.parent / "again.toml") == recipe


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda p: p.name)
def test_shipped_recipes_load_and_begin_with_their_command(path: Path):
    load_recipe(path)
    assert re.match(rf"# smf (compare|tune) recipes/{path.name}\b", path.read_text())


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda p: p.name)
def test_every_key_of_shipped_recipes_is_commented_where_it_is_set(path: Path):
    lines = path.read_text().splitlines()
    bare = [line for line in lines if re.match(r"[a-z_]+ = ", line) and " # " not in line]
    assert not bare


@pytest.mark.parametrize("path", sorted((SHIPPED.parents[2] / "docs/results").glob("*.toml")), ids=lambda p: p.name)
def test_recipes_behind_committed_results_load(path: Path):
    load_recipe(path)


def test_cutting_a_recipe_never_lengthens_it(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert shortened(recipe, 1000) == recipe
    assert (shortened(recipe, 1).train.steps, shortened(recipe, 1).heal.steps) == (1, 1)
    assert {probe.source.first for probe in limited(recipe, 7).probes.values()} == {7}
    assert limited(recipe, 7).target.eval["exam"].first == limited(recipe, 7).target.validation.first == 7
    assert limited(limited(recipe, 7), 0) == recipe


def test_a_cut_comes_after_the_recipes_own_limit_and_part(tmp_path: Path):
    recipe_file = make_world(tmp_path)

    def rows(*settings: str, cut: int) -> int:
        recipe = limited(load_recipe(recipe_file, settings), cut)
        return len(load_rows(recipe.probes["stories"].source, recipe.data, recipe.parts, []))

    part = rows(cut=0)
    assert 5 < part < 30 and rows(cut=5) == 5 and rows(cut=50) == part  # of 60 rows those of a part
    limit = "probes.stories.source.limit=40"
    assert 0 < rows(limit, cut=50) < part and rows(limit, cut=0) == part
    assert rows('probes.stories.source.part=""', "probes.stories.source.limit=4", cut=50) == 4


def test_unknown_key_names_the_nearest(recipe_file: Path):
    changed(recipe_file, "batch_size = 8\nmicro", "batchsize = 8\nmicro")
    with pytest.raises(ConfigError, match=r"train: unknown key 'batchsize'; did you mean 'batch_size'"):
        load_recipe(recipe_file)


def test_unknown_key_of_a_method_names_the_method(recipe_file: Path):
    changed(
        recipe_file,
        "rows_per_step = 8\nlr = 0.05\n\n[methods.smf-all]",
        "rows_a_step = 8\nlr = 1.0\n\n[methods.smf-all]",
    )
    with pytest.raises(ConfigError, match=r"methods.smf: unknown key 'rows_a_step'; did you mean 'rows_per_step'"):
        load_recipe(recipe_file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 4", 'steps = "4"', "expected int, got str"),
        ("steps = 4", "steps = true", "expected int, got bool"),
        ("micro_batch_size = 2", "micro_batch_size = 3", "not a multiple"),
        ("micro_batch_size = 2", "micro_batch_size = 0", "at least 1"),
        ("steps = 4", "steps = -5", "steps = -5; expected a finite number of at least 0"),
        ("lr = 1e-2", "lr = nan", "lr = nan; expected a finite number"),
        ("lr = 1e-2", "lr = inf", "lr = inf; expected a finite number"),
        ("r = 2", "r = 0", "r = 0; expected a finite number of at least 1"),
        ("save_every = 2", "save_every = 2\nmax_grad_norm = -1.0", "max_grad_norm = -1.0"),
        ("eval_batch_size = 8", "eval_batch_size = 8\nseed = -1", "seed = -1"),
        ("eval_batch_size = 8", f"eval_batch_size = 8\nseed = {2**63}", "expected one below 2147483648"),
        ('kind = "lora"', 'kind = "lorra"', "expected one of"),
        ("probe = 0.2", "probe = 0.9", "add up to 1"),
        ("lr = 1e-2", "lr = 0.0", "above 0"),
        ("[background]", "[ignored]", "unknown key 'ignored'"),
        ("eval_batch_size = 8", "eval_batch_size = 8 8", "not TOML"),
    ],
)
def test_bad_values_are_refused_by_name(recipe_file: Path, old: str, new: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_recipe(changed(recipe_file, old, new))


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("full", "r = 3"),
        ("full", "layers = [1]"),
        ("base", "lr = 0.1"),
        ("base", 'rule = "tf"'),
        ("healed", "rows_per_step = 3"),
        ("oft", "r = 3"),
        ("lora", "heal = true"),
        ("shira", "alpha = 1.0"),
        ("smf", "dropout = 0.1"),
        ("smf", "options = { a = 1 }"),
        ("dense-addon", 'train = "rows+scale"'),
    ],
)
def test_keys_that_a_kind_does_not_read_are_refused(recipe_file: Path, kind: str, key: str):
    lr = "" if kind in ("base", "healed") else "lr = 0.1\n"
    table = f'[methods.new]\nkind = "{kind}"\n{lr}{key}\n\n[methods.lora]'
    name = key.split(" =")[0]
    with pytest.raises(ConfigError, match=rf"methods.new\] {name} = .*kind '{kind}' does not read it; leave it out"):
        load_recipe(changed(recipe_file, "[methods.lora]", table))


NO_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "/a",
    "..\\\\a",
    "a\\u0000",
    "a\\nb",
    "\\u001b[2J",
    "con",
    "Nul.txt",
    "lpt1",
]


@pytest.mark.parametrize("name", [*NO_NAMES, "ä" * 101])
def test_names_that_are_no_part_of_a_folders_are_refused(recipe_file: Path, name: str):
    changed(recipe_file, "[methods.lora]", f'[methods."{name}"]')
    with pytest.raises(ConfigError, match=re.escape(f"a method is named {json.loads(chr(34) + name + chr(34))!r}")):
        load_recipe(recipe_file)


@pytest.mark.parametrize("name", ["a b", "ä", "a:b", "a.b", "-", "a=1", "console", "com", "ä" * 100])
def test_names_that_are_part_of_a_folders_are_read(recipe_file: Path, name: str):
    assert name in load_recipe(changed(recipe_file, "[methods.lora]", f'[methods."{name}"]')).methods


@pytest.mark.parametrize("axes", ["{ r = [2, 4] }", "{ r = [2, 2] }"])
def test_names_that_axes_give_twice_are_refused(recipe_file: Path, axes: str):
    changed(recipe_file, 'kind = "lora"\nr = 2', f'kind = "lora"\naxes = {axes}')
    if "4" in axes:
        assert {"lora-r=2", "lora-r=4"} < set(load_recipe(recipe_file).methods)
        changed(recipe_file, "[methods.full]", '[methods."lora-r=2"]')
    with pytest.raises(ConfigError, match="two methods are named 'lora-r=2' once axes are written out"):
        load_recipe(recipe_file)


def test_a_value_of_an_axis_that_is_no_part_of_a_folders_name_is_refused(recipe_file: Path):
    changed(recipe_file, 'kind = "lora"\nr = 2', 'kind = "lora"\naxes = { options = [{ a = "b/c" }] }')
    with pytest.raises(ConfigError, match=r"a method is named .*b/c"):
        load_recipe(recipe_file)


def test_kl_without_background_is_refused(recipe_file: Path):
    text = recipe_file.read_text()
    start, end = text.index("[background]"), text.index("[heal]")
    recipe_file.write_text(text[:start] + text[end:])
    with pytest.raises(ConfigError, match=r"rule = 'kl' needs a \[background\]"):
        load_recipe(recipe_file)


def test_run_id_changes_with_what_changes_a_result_and_with_nothing_else(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert recipe.run_id("smf") == load_recipe(recipe_file, output="elsewhere").run_id("smf")
    shown = dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, metrics=["acc"]))
    assert recipe.run_id("smf") == shown.run_id("smf")
    assert recipe.run_id("smf") != load_recipe(recipe_file, seed=1).run_id("smf")
    assert recipe.run_id("smf") != recipe.run_id("lora")
    changed(recipe_file, "lr = 1e-2", "lr = 2e-2")
    assert recipe.run_id("smf") == load_recipe(recipe_file).run_id("smf")
    assert recipe.run_id("lora") != load_recipe(recipe_file).run_id("lora")


def test_missing_recipe_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"local_example\.toml"):
        load_recipe("no_such_recipe.toml")
    assert find_recipe("recipes/local_example.toml").is_file()
    with pytest.raises(ConfigError, match="no recipe at"):
        find_recipe("mistyped/local_example.toml")


def test_runs_that_differ_in_method_or_seed_alone_can_stand_in_one_table(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    changed(recipe_file, "lr = 1e-2", "lr = 2e-2")
    assert load_recipe(recipe_file, seed=4, jobs=3, output="elsewhere").comparison_id() == recipe.comparison_id()
    changed(recipe_file, "steps = 4", "steps = 5")
    assert load_recipe(recipe_file).comparison_id() != recipe.comparison_id()


@pytest.mark.parametrize(("steps", "epochs"), [(10**18, 0.0), (10**9, 0.0), (0, 1e12)])
def test_a_training_that_no_machine_could_list_is_refused(steps: int, epochs: float):
    with pytest.raises(ConfigError, match="at most 100,000,000 can be put in order: lower steps, epochs or batch_size"):
        steps_of(steps, epochs, 40, 8)
    assert steps_of(1000, epochs, 40, 8) == 1000 and steps_of(0, 3.0, 40, 8) == 15
