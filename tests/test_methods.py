"""Methods beside rows, LoRA and full finetuning: controls, PEFT's others, replay, healing, and functions of users."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import batch, logits, tiny_base, tiny_config, tiny_model
from smf.addon import GatedMLP, add_dense, equal_width, load_dense, save_dense
from smf.base import load_base
from smf.compare import result_path
from smf.data import Example, in_order, with_replay
from smf.dry_run import dry_run
from smf.errors import ConfigError, DataError
from smf.evaluate import example_divergences
from smf.fingerprint import source_hash
from smf.methods import find_method
from smf.prepare import load
from smf.recipe import Recipe
from smf.recipe_file import load_recipe, to_toml
from smf.train import _prepare, run_method
from tiny import make_tokenizer, make_world

MORE = """
[replay]
source = {{ path = "stories.jsonl", part = "healing" }}

[methods.healed]
kind = "healed"
memory = {{ layers = [2], n_keys = 8, heads = 2, knn = 2, k_dim = 8, init = "paper" }}

[methods.attached-zero]
kind = "attached"

[methods.attached-replacement]
kind = "attached"
memory = {{ mode = "replacement", init = "paper", layers = [2], n_keys = 8, heads = 2, knn = 2, k_dim = 8 }}

[methods.random]
rule = "random"
rows_per_step = 8
lr = 0.05

[methods.tf]
rule = "tf"
rows_per_step = 8
lr = 0.05

[methods.masked-adam]
update = "masked-adam"
rows_per_step = 8
lr = 0.05

[methods.dense-addon]
kind = "dense-addon"
lr = 1e-2

[methods.lora-layers]
kind = "lora"
layers = [1, 2]
r = 2
lr = 1e-2

[methods.oft]
kind = "oft"
lr = 1e-2
options = {{ oft_block_size = 8 }}

[methods.osf]
kind = "osf"
lr = 1e-2

[methods.shira]
kind = "shira"
r = 2
lr = 1e-2

[methods.full-replay]
kind = "full"
replay = 0.25
lr = 1e-3

[methods.own]
kind = "my_methods:only_norms"
lr = 1e-2
"""

DOCUMENTED = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
OWN = re.findall(r"```python\n(.*?)```", DOCUMENTED, re.DOTALL)[0]
KINDS = [
    "healed",
    "random",
    "tf",
    "masked-adam",
    "dense-addon",
    "lora-layers",
    "oft",
    "osf",
    "shira",
    "full-replay",
    "own",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's recipe with one method of every further kind."""
    folder = tmp_path_factory.mktemp("methods")
    file = make_world(folder)
    file.write_text(file.read_text() + MORE.format())
    (folder / "my_methods.py").write_text(OWN)
    return file


@pytest.fixture(autouse=True)
def own_module(world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(world.parent))
    yield
    sys.modules.pop("my_methods", None)


def scored_on_the_way(recipe: Recipe, output: Path, *shares: float) -> Recipe:
    return replace(recipe, output=str(output), train=replace(recipe.train, score_at=list(shares)))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_trains_scores_and_saves(world: Path, name: str):
    recipe = load_recipe(world)
    result = run_method(recipe, name)
    assert math.isfinite(result["scores"]["exam"]["metrics"]["loss"])
    assert result["numbers_changed"] > 0 and result["trained_parameters"] >= result["numbers_changed"]
    assert result["steps"] == (0 if name == "healed" else 4)
    before = run_method(recipe, "base")["scores"]
    assert result["scores"]["stories"]["metrics"] != before["stories"]["metrics"]
    assert load_recipe(result_path(recipe, name).parent / "recipe.toml") == recipe


def test_a_memory_that_nothing_trains_shows_what_attaching_it_costs(world: Path):
    recipe = load_recipe(world)
    base, zero, instead = (run_method(recipe, name) for name in ("base", "attached-zero", "attached-replacement"))
    assert zero["scores"] == base["scores"] != instead["scores"]
    for result in (zero, instead):
        assert (result["steps"], result["rows_changed"], result["trained_parameters"]) == (0, 0, 0)


def test_a_dry_run_says_how_many_numbers_each_kind_trains_and_for_how_long(world: Path):
    recipe = load_recipe(world)
    planned = {name: (steps, trained.partition(" ")[0]) for name, _, _, steps, trained, _ in dry_run(recipe).methods}
    for name in [*KINDS, "attached-zero"]:
        result = run_method(recipe, name)
        trained = "?" if name in ("osf", "own") else f"{result['trained_parameters']:,}"
        assert planned[name] == (str(result["steps"]), trained), name


# -- the dense add-on -------------------------------------------------------------------------------------------------


def test_dense_addon_changes_no_logit_until_trained_and_nothing_but_itself():
    base = tiny_base()
    before = logits(base)
    model = add_dense(tiny_base().requires_grad_(False), tiny_config())
    assert torch.equal(logits(model), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 6 and all(".addon." in name and (".1." in name or ".2." in name) for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        model(**batch(seed=seed)).loss.backward()
        optimizer.step()
    assert not torch.equal(logits(model), before)
    own = {n.replace(".base.", "."): p for n, p in model.named_parameters() if ".addon." not in n}
    assert all(torch.equal(own[name], parameter) for name, parameter in base.named_parameters())


@pytest.mark.parametrize(
    "sizes", [{}, {"n_keys": 8, "heads": 1, "knn": 8, "k_dim": 32}, {"n_keys": 64, "heads": 4, "knn": 2, "k_dim": 8}]
)
def test_dense_addon_costs_as_many_flops_as_the_memory(sizes: dict):
    """Counted by torch on both models; the sum over the rows read is not a matrix product, so it is added by hand."""
    config, tokens = tiny_config(**sizes), 4 * 16

    def flops(model: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(**batch())
        return counter.get_total_flops()

    plain = flops(tiny_base())
    memory = flops(tiny_model(**sizes)) - plain + 2 * tokens * 2 * config.heads * config.knn * 32
    addon = flops(add_dense(tiny_base(), config)) - plain
    one_unit = 2 * tokens * 2 * 3 * 32
    assert abs(addon - memory) <= one_unit
    assert addon == one_unit * equal_width(config, 32)


def test_saved_addon_gives_the_trained_model(tmp_path: Path):
    model = add_dense(tiny_base(), tiny_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".addon." in name:
                parameter.normal_()
    save_dense(model, tmp_path / "addon.safetensors")
    again = load_dense(tiny_base(), tiny_config(), tmp_path / "addon.safetensors")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ConfigError, match="this model and config"):
        load_dense(tiny_base(), tiny_config(layers=[0]), tmp_path / "addon.safetensors")
    with pytest.raises(ConfigError, match="cannot be made for mode='replacement'"):
        add_dense(tiny_base(), tiny_config(mode="replacement", init="paper"))


def test_addon_of_a_half_precision_base_trains_in_float32():
    model = add_dense(tiny_base().bfloat16(), tiny_config())
    assert {p.dtype for m in model.modules() if isinstance(m, GatedMLP) for p in m.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


# -- where PEFT's methods stand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "oft", "osf", "shira"])
def test_methods_of_peft_can_be_kept_to_some_layers(world: Path, kind: str):
    recipe = load_recipe(world)
    name = {"lora": "lora-layers"}.get(kind, kind)
    method = replace(recipe.methods[name], layers=[1, 2])
    loaded = load(recipe)
    prepared = find_method(kind)(load_base(recipe), method, recipe, loaded)
    trained = [name for name, p in prepared.model.named_parameters() if p.requires_grad]
    assert trained and {int(name.split(".layers.")[1].split(".")[0]) for name in trained} == {1, 2}
    with pytest.raises(Exception, match="layer index 9 is out of range"):
        find_method(kind)(load_base(recipe), replace(method, layers=[9]), recipe, loaded)


def test_options_that_peft_does_not_know_are_refused_by_name(world: Path):
    recipe = load_recipe(world)
    with pytest.raises(ConfigError, match=r"'oft_blocks': 3.*do not fit PEFT's OFTConfig"):
        find_method("oft")(
            load_base(recipe), replace(recipe.methods["oft"], options={"oft_blocks": 3}), recipe, load(recipe)
        )


# -- replay -----------------------------------------------------------------------------------------------------------


def test_replay_takes_its_share_and_leaves_the_targets_order():
    target = [Example(f"t{i}", [1, 2], 1) for i in range(30)]
    text = [Example(f"r{i}", [1, 2], 0) for i in range(7)]
    mixed = with_replay(target, text, 0.05, 400, seed=3)
    assert len(mixed) == 400 and sum(e.id.startswith("r") for e in mixed) == 20
    kept = [e.id for e in mixed if e.id.startswith("t")]
    assert kept == [e.id for e in in_order(target, 380, seed=3)]
    assert {e.id for e in mixed if e.id.startswith("r")} == {f"r{i}" for i in range(7)}
    places = [i for i, e in enumerate(mixed) if e.id.startswith("r")]
    assert places != [i for i, e in enumerate(with_replay(target, text, 0.05, 400, seed=4)) if e.id.startswith("r")]
    assert max(places) > 200 and min(places) < 200  # spread over the training
    assert with_replay(target, [], 0.0, 50, seed=3) == in_order(target, 50, seed=3)


def changed(world: Path, folder: Path, before: str, after: str) -> Path:
    """The world's recipe with another text in place of one that it has."""
    assert before in world.read_text()
    file = folder / "recipe.toml"
    file.write_text(world.read_text().replace(before, after))
    return file


def test_replayed_text_is_never_scored(world: Path, tmp_path: Path):
    before = '[replay]\nsource = { path = "stories.jsonl", part = "healing" }'
    file = changed(world, tmp_path, before, '[replay]\nsource = { path = "stories.jsonl" }')
    with pytest.raises(DataError, match=r"of \[replay\] are scored as well"):
        load(load_recipe(file))


def test_replay_without_text_is_refused(world: Path, tmp_path: Path):
    file = changed(world, tmp_path, "replay = 0.25", "replay = 1.0")
    with pytest.raises(ConfigError, match=r"replay = 1\.0; expected a share below 1"):
        load_recipe(file)
    text = world.read_text()
    file.write_text(text[: text.index("[replay]")] + text[text.index("[methods.healed]") :])
    with pytest.raises(ConfigError, match=r"replay = 0.25 needs a \[replay\] table"):
        load_recipe(file)


# -- healing ----------------------------------------------------------------------------------------------------------


def test_methods_with_one_memory_share_its_healing(world: Path, tmp_path: Path):
    recipe = load_recipe(world, output=str(tmp_path))
    loaded = load(recipe)
    _prepare(recipe, "healed", loaded, tmp_path / "one")
    (healed,) = tmp_path.glob("healed-*")
    first = (healed / "adapter_model.safetensors").stat().st_mtime_ns
    same = replace(recipe, methods=recipe.methods | {"smf": replace(recipe.methods["smf-healed"], lr=0.5, rule="all")})
    _prepare(same, "smf", loaded, tmp_path / "two")
    assert list(tmp_path.glob("healed-*")) == [healed]
    assert (healed / "adapter_model.safetensors").stat().st_mtime_ns == first
    _prepare(replace(recipe, seed=1), "healed", loaded, tmp_path / "three")
    assert len(list(tmp_path.glob("healed-*"))) == 2


# -- functions of users -----------------------------------------------------------------------------------------------


def test_own_function_trains_what_it_says(world: Path):
    recipe = load_recipe(world)
    prepared = find_method("my_methods:only_norms")(load_base(recipe), recipe.methods["own"], recipe, load(recipe))
    assert prepared.trained == 32 * 9  # two norms in each of four layers, and the last one


def test_the_command_finds_an_own_function_in_the_current_folder(world: Path, tmp_path: Path):
    smf_command = [str(Path(sys.executable).with_name("smf")), "compare", str(world), "--methods", "own"]
    rest = ["--output", str(tmp_path / "runs"), "--max-steps", "1", "--format", "csv"]
    done = subprocess.run([*smf_command, *rest], cwd=world.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\nscore,own,0.01," in done.stdout
    (file,) = (tmp_path / "runs").glob("own-*/result.json")
    assert json.loads(file.read_text())["code"] == source_hash("my_methods")


WRONG = """
from dataclasses import replace
from my_methods import only_norms


def nothing(*arguments):
    return None


def mute(*arguments):
    return replace(only_norms(*arguments), save=lambda folder: None)
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [("nothing", "returned None; expected a smf.methods.Prepared"), ("mute", "save returned None; expected a table")],
)
def test_an_own_function_that_returns_something_else_is_told_what_is_expected(
    world: Path, tmp_path: Path, function: str, message: str
):
    (world.parent / "wrong_methods.py").write_text(WRONG)
    importlib.invalidate_caches()
    recipe = load_recipe(changed(world, tmp_path, "my_methods:only_norms", f"wrong_methods:{function}"))
    with pytest.raises(ConfigError, match=message):
        run_method(replace(recipe, output=str(tmp_path / "runs")), "own")


def test_runs_of_an_own_function_change_name_with_its_code(world: Path):
    recipe = load_recipe(world)
    before, other = recipe.run_id("own"), recipe.run_id("oft")
    file = world.parent / "my_methods.py"
    file.write_text(OWN + "\n# changed\n")
    assert recipe.run_id("own") != before and recipe.run_id("oft") == other
    file.write_text(OWN)
    assert recipe.run_id("own") == before


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("my_method:only_norms", "module 'my_method' cannot be imported"),
        ("my_methods:only_norm", "has no function 'only_norm'"),
    ],
)
def test_functions_that_do_not_exist_are_refused_before_training(world: Path, tmp_path: Path, kind: str, message: str):
    file = changed(world, tmp_path, "my_methods:only_norms", kind)
    with pytest.raises(ConfigError, match=message):
        load(load_recipe(file))


def test_unknown_kind_is_refused_with_the_known_ones(world: Path, tmp_path: Path):
    file = changed(world, tmp_path, 'kind = "oft"', 'kind = "boft"')
    with pytest.raises(ConfigError, match=r"kind = 'boft'; expected one of .*'oft'.*module:function"):
        load_recipe(file)


# -- axes -------------------------------------------------------------------------------------------------------------


def test_axes_make_a_method_of_every_combination(world: Path, tmp_path: Path):
    axes = "axes = { rows_per_step = [4, 8], layers = [[1], [1, 2]] }\n"
    before = '[methods.tf]\nrule = "tf"\nrows_per_step = 8\n'
    recipe = load_recipe(changed(world, tmp_path, before, f'[methods.tf]\nrule = "tf"\n{axes}'))
    made = {name: (m.rows_per_step, m.layers) for name, m in recipe.methods.items() if name.startswith("tf")}
    assert made == {
        "tf-t=4-layers=1": (4, [1]),
        "tf-t=4-layers=1+2": (4, [1, 2]),
        "tf-t=8-layers=1": (8, [1]),
        "tf-t=8-layers=1+2": (8, [1, 2]),
    }
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    prepared, _ = _prepare(recipe, "tf-t=4-layers=1", load(recipe), tmp_path)
    assert [
        f"layers.{i}."
        for i in range(4)
        if any(f"layers.{i}.mlp.sparse" in n for n, _ in prepared.model.named_parameters())
    ] == ["layers.1."]


@pytest.mark.parametrize(
    "axes", ["{ rows = [1] }", "{ rows_per_step = 4 }", "{ rows_per_step = [] }", "{ lr = [1.0] }"]
)
def test_axes_that_make_no_method_are_refused(world: Path, tmp_path: Path, axes: str):
    file = tmp_path / "recipe.toml"
    file.write_text(world.read_text().replace('rule = "tf"\n', f'rule = "tf"\naxes = {axes}\n'))
    with pytest.raises(ConfigError, match="expected lists of values for keys of"):
        load_recipe(file)


# -- scoring on the way, and divergence -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smf", "lora"])
def test_scoring_on_the_way_changes_nothing(world: Path, tmp_path: Path, name: str):
    recipe = load_recipe(world)
    recipe = replace(recipe, methods=recipe.methods | {"lora": replace(recipe.methods["lora"], dropout=0.5)})
    calm = run_method(scored_on_the_way(recipe, tmp_path / "calm"), name)
    scored = run_method(scored_on_the_way(recipe, tmp_path / "scored", 0.25, 0.5), name)
    assert scored["scores"] == calm["scores"]
    assert [(stage["step"], stage["share"]) for stage in scored["on_the_way"]] == [(1, 0.25), (2, 0.5)]
    losses = [stage["scores"]["exam"]["metrics"]["loss"] for stage in scored["on_the_way"]]
    assert len({*losses, calm["scores"]["exam"]["metrics"]["loss"]}) == 3
    short = replace(
        scored_on_the_way(recipe, tmp_path / "short"),
        train=replace(recipe.train, steps=1, schedule="constant_with_warmup"),
    )
    if name == "smf":  # the first step of a cosine schedule has the whole rate
        assert run_method(short, name)["scores"]["exam"]["metrics"]["loss"] == losses[0]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5])
def test_shares_beyond_the_steps_are_refused(world: Path, tmp_path: Path, share: float):
    file = tmp_path / "recipe.toml"
    file.write_text(world.read_text().replace("save_every = 2\n", f"save_every = 2\nscore_at = [{share}]\n"))
    with pytest.raises(ConfigError, match="score_at"):
        load_recipe(file)


def test_divergence_is_that_of_the_formula_and_zero_for_the_base(world: Path, tmp_path: Path):
    recipe = replace(load_recipe(world, output=str(tmp_path)), divergence=5)
    base, after = run_method(recipe, "base")["scores"], run_method(recipe, "full")["scores"]
    assert {name for name in after if name.startswith("KL ")} == {"KL exam", "KL stories"}
    for name in ("KL exam", "KL stories"):
        assert base[name]["metrics"]["nats"] == 0 and len(after[name]["records"]) == 5
        assert after[name]["role"] == "divergence" and after[name]["metrics"]["nats"] > 0


def test_divergence_of_one_example_by_hand():
    a, b = tiny_base(0).double(), tiny_base(1).double()
    examples = [Example("x", [5, 6, 7, 8, 9], 2), Example("y", [4, 3, 2], 1)]
    records = example_divergences(b, a, examples, make_tokenizer(), loss="answer", batch_size=2)
    for record, example in zip(records, examples, strict=True):
        ids = torch.tensor([example.ids])
        p, q = (model(input_ids=ids).logits[0, example.start - 1 : -1].log_softmax(-1) for model in (a, b))
        assert record["nats"] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)
        assert (record["id"], record["tokens"]) == (example.id, len(example.ids) - example.start)


def test_clusters_are_written_into_the_records(world: Path, tmp_path: Path):
    recipe = load_recipe(world, output=str(tmp_path))
    exam = {name: replace(source, cluster="q") for name, source in recipe.target.eval.items()}
    recipe = replace(recipe, target=replace(recipe.target, eval=exam))
    records = run_method(recipe, "base")["scores"]["exam"]["records"]
    assert all(record["cluster"] == record["id"].split("q")[0] for record in records)
    assert json.loads(result_path(recipe, "base").read_text())["comparison"] == recipe.comparison_id()
