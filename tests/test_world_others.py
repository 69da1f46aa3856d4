"""Worlds beside the embedded one: other facts under another seed, more of them, written for recipes, read by a base."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from smf.errors import ConfigError
from smf.recipe import Source
from smf.recipe_file import load_recipe
from smf.sources import load_rows
from smf.world import BASE, SETS, write
from smf.world.facts import COUNTS, EMBEDDED, NEW_DISEASES, World, general, new_diseases
from smf.world.text import pretraining_text
from smf.world.tokenizer import vocabulary
from smf.world.train_base import config, train


@pytest.mark.parametrize("which", [World(seed=1), World(seed=2, times=2), World(seed=1, times=3)])
def test_other_worlds_have_so_many_times_the_facts(which: World):
    counts = Counter(entity.kind for entity in general(which))
    assert counts == {kind: which.times * count for kind, count in COUNTS.items()}
    assert len(new_diseases(which)) == which.times * NEW_DISEASES
    assert set(vocabulary(World(which.seed, 1))) <= set(vocabulary(which))


def test_facts_and_what_is_asked_are_balanced():
    which = World(seed=1, times=3)
    for kind in COUNTS:
        entities = [entity for entity in general(which) if entity.kind == kind]
        assert sum(entity.asked for entity in entities) * 2 == len(entities)
        for name in entities[0].values:
            counts = Counter(entity.values[name] for entity in entities).values()
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("pair", [(EMBEDDED, World(seed=1)), (World(seed=1), World(seed=2))], ids=["0-1", "1-2"])
def test_another_seed_is_another_world(pair: tuple[World, World]):
    ours, others = ({e.name: e for e in (*general(which), *new_diseases(which))} for which in pair)
    shared = ours.keys() & others.keys()
    equal = [ours[name].values[a] == others[name].values[a] for name in shared for a in ours[name].values]
    assert len(shared) > 100 and sum(equal) / len(equal) < 0.15  # by chance a twelfth
    assert 0.3 < sum(ours[name].asked == others[name].asked for name in shared) / len(shared) < 0.7
    for part in (general, new_diseases):
        assert {e.name for e in part(pair[0])} != {e.name for e in part(pair[1])}
    first, second = ({*islice(pretraining_text(0, which), 500)} for which in pair)
    assert len(first & second) < 10  # short questions on towns


@pytest.mark.parametrize("times", [0, -1, 4])
def test_worlds_without_enough_names_are_refused(times: int):
    with pytest.raises(ConfigError, match=f"times is {times}; there are names for a world of 1 to 3 times"):
        World(seed=1, times=times)


# -- written, for recipes to read -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write.write(folder, seed=1, times=3)
    return folder


@pytest.mark.parametrize("name", SETS)
def test_recipes_read_what_was_written(folder: Path, name: str):
    assert load_rows(Source(path=name), str(folder), {}, []) == write.rows_of_set(name, World(seed=1, times=3))


def test_recipes_for_the_embedded_world_find_all_their_sets(folder: Path):
    recipe = load_recipe("late_rows.toml", data=str(folder))
    assert recipe.background
    for source in (recipe.target.train, recipe.background.source, *(p.source for p in recipe.probes.values())):
        assert load_rows(source, recipe.data, recipe.parts, [])


def test_a_killed_writing_leaves_whole_files_and_is_made_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def killed(source: str, target: Path) -> None:
        if target.name == "near_domain":
            raise Killed
        Path(source).rename(target)

    with monkeypatch.context() as patch:
        patch.setattr("smf.files.os.replace", killed)
        with pytest.raises(Killed):
            write.write(tmp_path, seed=1, times=3)
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert left.items() < whole.items() and "near_domain" not in left
    write.write(tmp_path, seed=1, times=3)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_a_folder_keeps_the_world_that_it_has(folder: Path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(before) == {*SETS, "world.json"} and json.loads(before["world.json"])["times"] == 3
    with pytest.raises(ConfigError, match="holds another world than that of seed 2, times 3"):
        write.write(folder, seed=2, times=3)
    write.write(folder, seed=1, times=3)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# -- a base of another world and size ---------------------------------------------------------------------------------


def test_a_base_of_another_world_and_size(tmp_path: Path):
    """One step of a tiny one; a training with other options is refused."""
    train(tmp_path, steps=1, world_seed=1, times=3, layers=1, width=32)
    shape = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size) == (1, 32, 96)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    own = set(vocabulary(World(seed=1, times=3))) - set(vocabulary())
    assert len(own) > 100 and all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in own)
    for other in ({"layers": 2}, {"width": 64}, {"world_seed": 2}, {"times": 2}):
        options = {"world_seed": 1, "times": 3, "layers": 1, "width": 32} | other
        with pytest.raises(ConfigError, match="holds a training with other options"):
            train(tmp_path, steps=1, **options)


def test_heads_are_32_wide_whatever_the_width():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    shapes = [config(tokenizer, 8, width) for width in (32, 160, 192)]
    assert [(s.num_attention_heads, s.num_key_value_heads) for s in shapes] == [(1, 1), (5, 1), (6, 2)]
    for layers, width in ((0, 192), (6, 100), (6, 0)):
        with pytest.raises(ConfigError, match="a multiple of 32"):
            config(tokenizer, layers, width)
