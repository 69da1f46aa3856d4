"""Patches: exactly the rows that changed, applied and reverted bit for bit, and refused wherever they do not belong."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import smf
from conftest import batch, logits, tiny_base, tiny_config, tiny_model, train
from smf.fingerprint import json_hash, tensors_hash

LOAD = """
import sys, torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import smf

torch.set_num_threads(1)
folder = sys.argv[1]
ids = torch.load(f"{folder}/ids.pt")


def base():
    return AutoModelForCausalLM.from_pretrained(f"{folder}/base").eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=ids).logits.clone()


out = {"base": logits(base()), "adapter": logits(PeftModel.from_pretrained(base(), f"{folder}/adapter"))}
patch = smf.load_patch(f"{folder}/a.smf")
model = get_peft_model(base(), patch.config).eval()
out["attached"] = logits(model)
patch.apply(model)
out["applied"] = logits(model)
patch.revert(model)
out["reverted"] = logits(model)
save_file(out, f"{folder}/logits.safetensors")
"""


def memory_state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.state_dict().items() if "sparse_memory_" in n}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """As torch.equal, but telling 0.0 from -0.0 and NaN from nothing."""
    return a.keys() == b.keys() and tensors_hash(a) == tensors_hash(b)


def changed_rows(before: Tensor, after: Tensor) -> list[int]:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
    return (before.view(whole) != after.view(whole)).any(-1).nonzero().flatten().tolist()


def tables(model: nn.Module) -> dict[int, Tensor]:
    return {layer: memory.values.detach().clone() for layer, memory in smf.memory_layers(model).items()}


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["smf_patch"])  # noqa: SIM118


def forge(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write a patch file whose checksums are right, whatever its content."""
    header = {k: v for k, v in header.items() if k != "checksum"} | {"tensors": tensors_hash(tensors)}
    text = json.dumps(header | {"checksum": json_hash(header)}, sort_keys=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"smf_patch": text})
    return path


# -- what a patch holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["adam", "sgd", "masked-adam"])
@pytest.mark.parametrize("init", ["zero", "paper"])
def test_a_patch_lists_exactly_the_rows_whose_bytes_changed(init: str, update: str, tmp_path: Path):
    model = tiny_model(init=init)
    before = tables(model)
    train(model, steps=3, update=update)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    after = tables(model)
    for layer in (1, 2):
        assert patch.rows[layer].tolist() == changed_rows(before[layer], after[layer])
        assert len(patch.rows[layer]) >= 8
        assert torch.equal(patch.old[layer], before[layer][patch.rows[layer]])
        assert torch.equal(patch.new[layer], after[layer][patch.rows[layer]])


def test_rows_that_were_chosen_but_did_not_move_are_left_out(tmp_path: Path):
    model = tiny_model()
    train(model, steps=2, lr=0.0)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    assert all(len(rows) == 0 for rows in patch.rows.values())
    patch.apply(tiny_model())


def test_a_patch_carries_what_it_belongs_to_and_the_users_metadata(tmp_path: Path):
    model = tiny_model(seed=3, init="paper")
    train(model)
    patch = smf.save_patch(model, tmp_path / "a.smf", corpus="medicine", steps=[1, 2], nested={"10": 1, "9": None})
    assert patch.metadata["metadata"] == {"corpus": "medicine", "steps": [1, 2], "nested": {"10": 1, "9": None}}
    assert (patch.config.layers, patch.config.n_keys, patch.config.init) == ([1, 2], 16, "paper")
    assert patch.metadata["base_hash"] == model.peft_config["default"].base_hash
    loaded = smf.load_patch(tmp_path / "a.smf")
    assert loaded.metadata == patch.metadata
    assert all(torch.equal(loaded.new[layer], patch.new[layer]) for layer in patch.rows)


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.ones(1), float("nan"), b"x"], ids=lambda v: type(v).__name__)
def test_metadata_must_be_json(value: object, tmp_path: Path):
    model = tiny_model()
    train(model, steps=1)
    with pytest.raises(smf.PatchError, match="JSON"):
        smf.save_patch(model, tmp_path / "a.smf", note=value)
    assert not list(tmp_path.iterdir())


def test_metadata_keys_that_json_turns_into_text_do_not_break_the_file(tmp_path: Path):
    model = tiny_model()
    train(model, steps=1)
    patch = smf.save_patch(model, tmp_path / "a.smf", counts={9: 1, 10: 2}, pair=(1, 2))
    assert patch.metadata["metadata"] == {"counts": {"9": 1, "10": 2}, "pair": [1, 2]}


def test_old_rows_of_a_reproducible_start_are_left_out(tmp_path: Path):
    model = tiny_model(base={"hidden_size": 64}, init="paper", n_keys=32)
    train(model, steps=12, rule="all", lr=0.1)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    rows = sum(len(ids) for ids in patch.rows.values())
    assert rows > 900
    tensors, _ = read_file(tmp_path / "a.smf")
    assert sorted(tensors) == ["1.ids", "1.new", "2.ids", "2.new"]
    size = (tmp_path / "a.smf").stat().st_size
    assert rows * 64 * 4 < size < rows * 64 * 4 * 1.05


def test_scale_is_kept_whole_where_it_trained(tmp_path: Path):
    model = tiny_model(train="rows+scale")
    start = memory_state(model)
    train(model, steps=3, lr_other=0.1)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    for layer, memory in smf.memory_layers(model).items():
        assert set(patch.new_others[layer]) == {"scale"}
        assert torch.equal(patch.new_others[layer]["scale"], memory.tensor("scale"))
        assert patch.old_others[layer]["scale"].item() == 1.0
    fresh = tiny_model()
    patch.apply(fresh)
    assert torch.equal(logits(fresh), logits(model))
    patch.revert(fresh)
    assert same_bits(memory_state(fresh), start)


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path: Path):
    model = tiny_model(init="paper", train="rows+scale")
    train(model, steps=3)
    smf.save_patch(model, tmp_path / "a.smf", by="test")
    smf.save_patch(model, tmp_path / "b.smf", by="test")
    fresh = tiny_model(init="paper", train="rows+scale")
    smf.load_patch(tmp_path / "a.smf").apply(fresh)
    smf.save_patch(fresh, tmp_path / "c.smf", by="test")
    first, again, applied = ((tmp_path / f"{name}.smf").read_bytes() for name in "abc")
    assert first == again == applied


def test_more_layers_than_nine_keep_their_order(tmp_path: Path):
    deep = {"base": {"num_hidden_layers": 12}, "layers": [2, 6, 10, 11]}
    model = tiny_model(**deep)
    train(model)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    assert list(patch.rows) == [2, 6, 10, 11]
    fresh = tiny_model(**deep)
    patch.apply(fresh)
    assert torch.equal(logits(fresh), logits(model))
    patch.revert(fresh)
    assert torch.equal(logits(fresh), logits(tiny_base(num_hidden_layers=12)))


# -- apply and revert -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["adam", "sgd", "masked-adam"])
@pytest.mark.parametrize(
    "config",
    [{}, {"init": "paper"}, {"init": "paper", "mode": "replacement"}, {"table_dtype": "bfloat16"}],
    ids=["zero", "paper", "replacement", "bfloat16"],
)
def test_apply_gives_the_trained_model_and_revert_the_start(config: dict, update: str, tmp_path: Path):
    model = tiny_model(**config)
    start = memory_state(model)
    train(model, steps=3, lr=0.1, update=update)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    fresh = tiny_model(**config)
    patch.apply(fresh)
    assert same_bits(memory_state(fresh), memory_state(model))
    assert torch.equal(logits(fresh), logits(model))
    patch.revert(fresh)
    assert same_bits(memory_state(fresh), start)
    patch.revert(model)  # the trained model itself too
    assert same_bits(memory_state(model), start)


def test_a_reverted_patch_gives_the_base(tmp_path: Path):
    model = tiny_model()
    train(model, lr=0.1)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    patch.revert(model)
    assert torch.equal(logits(model), logits(tiny_base()))


def test_a_fresh_process_loads_the_trained_model_by_adapter_and_by_patch(tmp_path: Path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    ids = batch(2, 12, 7)["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    before = logits(base)
    model = get_peft_model(base, tiny_config(train="rows+scale"))
    train(model, steps=4, lr=0.1)
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    smf.save_patch(model, tmp_path / "a.smf")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, env=environment, timeout=120)
    with safe_open(str(tmp_path / "logits.safetensors"), framework="pt") as file:
        seen = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert not torch.equal(before, trained)
    for key, expected in {
        "base": before,
        "attached": before,
        "reverted": before,
        "adapter": trained,
        "applied": trained,
    }.items():
        assert torch.equal(seen[key], expected), key


def test_patches_stack_and_come_off_in_reverse_order(tmp_path: Path):
    model = tiny_model()
    start = memory_state(model)
    train(model, steps=2, seed=0, lr=0.1)
    first = smf.save_patch(model, tmp_path / "a.smf")
    middle = memory_state(model)
    train(model, steps=2, seed=50, lr=0.1)  # a new optimizer: the second patch is relative to this moment
    second = smf.save_patch(model, tmp_path / "b.smf")
    end = memory_state(model)
    assert any(set(first.rows[layer].tolist()) & set(second.rows[layer].tolist()) for layer in first.rows)

    fresh = tiny_model()
    with pytest.raises(smf.PatchError, match="not what the patch replaced"):
        second.apply(fresh)
    assert same_bits(memory_state(fresh), start)
    first.apply(fresh)
    assert same_bits(memory_state(fresh), middle)
    second.apply(fresh)
    assert same_bits(memory_state(fresh), end)
    with pytest.raises(smf.PatchError, match="not what the patch wrote"):
        first.revert(fresh)
    assert same_bits(memory_state(fresh), end)
    second.revert(fresh)
    assert same_bits(memory_state(fresh), middle)
    first.revert(fresh)
    assert same_bits(memory_state(fresh), start)


def test_a_patch_after_healing_fits_the_healed_memory_alone(tmp_path: Path):
    model = tiny_model(init="paper", train="memory")
    train(model, steps=3, rule="all", lr=1e-3)
    model.save_pretrained(tmp_path / "healed")
    healed = memory_state(model)
    smf.set_train(model, "rows")
    train(model, steps=2, seed=20)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    assert all(len(rows) <= 16 and not patch.new_others[layer] for layer, rows in patch.rows.items())

    again = PeftModel.from_pretrained(tiny_base(), tmp_path / "healed")
    patch.apply(again)
    assert torch.equal(logits(again), logits(model))
    patch.revert(again)
    assert same_bits(memory_state(again), healed)

    fresh = tiny_model(init="paper")
    untouched = memory_state(fresh)
    with pytest.raises(smf.PatchError, match="healing"):
        patch.apply(fresh)
    assert same_bits(memory_state(fresh), untouched)


def test_a_patch_of_the_healing_itself_holds_the_whole_memory(tmp_path: Path):
    model = tiny_model(init="paper", train="memory")
    train(model, steps=2, rule="all", lr=1e-3)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    assert set(patch.new_others[1]) == {"scale", "query_weight", "query_bias", "keys", "gate", "out"}
    fresh = tiny_model(init="paper")
    patch.apply(fresh)
    assert torch.equal(logits(fresh), logits(model))


def test_a_loaded_models_patch_is_relative_to_the_start(tmp_path: Path):
    model = tiny_model(init="paper")
    train(model, steps=2, seed=0)
    train(model, steps=2, seed=50)  # two trainings: the adapter holds both
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "adapter")
    patch = smf.save_patch(loaded, tmp_path / "a.smf")
    fresh = tiny_model(init="paper")
    start = memory_state(fresh)
    patch.apply(fresh)
    assert torch.equal(logits(fresh), logits(model))
    patch.revert(fresh)
    assert same_bits(memory_state(fresh), start)


def test_a_patch_is_of_one_adapter(tmp_path: Path):
    model = tiny_model()
    model.add_adapter("second", tiny_config(layers=[0, 3], seed=1))
    model.set_adapter("second")
    train(model)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    assert list(patch.rows) == [0, 3]
    with pytest.raises(smf.PatchError, match=r"layers \[0, 3\]"):
        patch.apply(model, adapter="default")
    patch.revert(model, adapter="second")
    assert torch.equal(logits(model), logits(tiny_base()))
    with pytest.raises(smf.PatchError, match="nobody"):
        patch.apply(model, adapter="nobody")


def test_a_patch_from_a_bfloat16_base_fits_the_same_base_in_float32(tmp_path: Path):
    half = tiny_base().to(torch.bfloat16)
    whole = copy.deepcopy(half).float()
    model = get_peft_model(half, tiny_config())
    train(model)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    wide = get_peft_model(whole, tiny_config())
    patch.apply(wide)
    assert same_bits(memory_state(wide), memory_state(model))


def test_training_goes_on_after_a_patch_was_applied(tmp_path: Path):
    model = tiny_model()
    train(model, lr=0.1)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    fresh = tiny_model()
    patch.apply(fresh)
    train(fresh, seed=30)
    train(model, seed=30)
    assert same_bits(memory_state(fresh), memory_state(model))


# -- refusals, each of which changes nothing --------------------------------------------------------------------------


@pytest.fixture
def patch_file(tmp_path: Path) -> Path:
    model = tiny_model(train="rows+scale")
    train(model, steps=2, lr=0.1)
    smf.save_patch(model, tmp_path / "a.smf", corpus="medicine")
    return tmp_path / "a.smf"


def one_weight_changed() -> nn.Module:
    base = tiny_base()
    with torch.no_grad():
        base.model.layers[3].mlp.down_proj.weight[0, 0] += 0.5
    return get_peft_model(base, tiny_config())


def one_row_changed() -> nn.Module:
    model = tiny_model()
    with torch.no_grad():
        for memory in smf.memory_layers(model).values():
            memory.values.add_(1e-30)
    return model


def scale_changed() -> nn.Module:
    model = tiny_model()
    with torch.no_grad():
        smf.memory_layers(model)[2].tensor("scale").fill_(0.5)
    return model


WRONG_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another base": (lambda: tiny_model(seed=1), "another base"),
    "one weight of the base": (one_weight_changed, "another base"),
    "another seed": (lambda: get_peft_model(tiny_base(), tiny_config(seed=1)), "seed=1"),
    "other layers": (lambda: tiny_model(layers=[1, 3]), r"\[1, 3\]"),
    "more keys": (lambda: tiny_model(n_keys=17), "n_keys=17"),
    "another k": (lambda: tiny_model(knn=5), "knn=5"),
    "another start": (lambda: tiny_model(init="paper"), "init='paper'"),
    "another table": (lambda: tiny_model(table_dtype="bfloat16"), "bfloat16"),
    "wrong old rows": (one_row_changed, "rows of layer 1"),
    "another scale": (scale_changed, "scale of layer 2"),
    "no memory": (tiny_base, "layers \\[1, 2\\]"),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_a_patch_is_refused_where_it_does_not_belong(case: str, patch_file: Path):
    make, message = WRONG_MODELS[case]
    model, patch = make(), smf.load_patch(patch_file)
    before = memory_state(model)
    with pytest.raises(smf.PatchError, match=message):
        patch.apply(model)
    with pytest.raises(smf.PatchError):
        patch.revert(model)
    assert same_bits(memory_state(model), before)


def test_wrong_rows_are_named(patch_file: Path):
    model, patch = tiny_model(), smf.load_patch(patch_file)
    row = int(patch.rows[2][3])
    with torch.no_grad():
        smf.memory_layers(model)[2].values[row, 0] = -0.0  # equal in value, not in bits
    with pytest.raises(smf.PatchError, match=rf"1 of \d+ rows of layer 2 .* rows \[{row}\]"):
        patch.apply(model)


def test_a_patch_applies_once_and_reverts_once(patch_file: Path):
    model, patch = tiny_model(), smf.load_patch(patch_file)
    with pytest.raises(smf.PatchError, match="cannot revert"):
        patch.revert(model)
    patch.apply(model)
    applied = memory_state(model)
    with pytest.raises(smf.PatchError, match="cannot apply"):
        patch.apply(model)
    assert same_bits(memory_state(model), applied)


def test_a_missing_or_truncated_file_is_refused(patch_file: Path, tmp_path: Path):
    with pytest.raises(smf.PatchError, match="no patch file"):
        smf.load_patch(tmp_path / "missing.smf")
    content = patch_file.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        patch_file.write_bytes(content[:length])
        with pytest.raises(smf.PatchError, match="not a readable patch"):
            smf.load_patch(patch_file)


def test_a_byte_altered_anywhere_is_noticed(patch_file: Path):
    content = patch_file.read_bytes()
    positions = torch.randint(len(content), (300,), generator=torch.Generator().manual_seed(0)).tolist()
    for position in {*positions, *range(8), content.index(b"medicine"), content.index(b"base_hash") + 20}:
        altered = bytearray(content)
        altered[position] ^= 1
        patch_file.write_bytes(altered)
        with pytest.raises(smf.PatchError):
            smf.load_patch(patch_file)


def test_a_file_that_is_no_patch_is_refused(tmp_path: Path):
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(smf.PatchError, match="not a patch"):
        smf.load_patch(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(smf.PatchError, match="not a readable patch"):
        smf.load_patch(tmp_path / "text")
    with pytest.raises(smf.PatchError, match="no patch file"):
        smf.load_patch(tmp_path)


def test_a_newer_format_is_refused_by_its_number(patch_file: Path):
    tensors, header = read_file(patch_file)
    forge(patch_file, tensors, header | {"format": 3})
    with pytest.raises(smf.PatchError, match=r"format 3.*reads 2; update smf"):
        smf.load_patch(patch_file)
    for known in (1, True, "2", None):
        forge(patch_file, tensors, header | {"format": known})
        with pytest.raises(smf.PatchError, match=r"reads 2; it was written by an earlier version"):
            smf.load_patch(patch_file)


def _set(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict, dict], None]:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        tensors[key] = value(tensors[key].clone())

    return change


def _first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[0] = value
        return tensor

    return change


def _repeat_first(ids: Tensor) -> Tensor:
    ids[1] = ids[0]
    return ids


OLD_ROW = {"1.old": torch.ones(1, 32)}


def _places(place: int) -> Tensor:
    return torch.tensor([place], dtype=torch.int32)


FORGED: dict[str, tuple[Callable[[dict, dict], Any], str]] = {
    "NaN rows": (_set("1.new", _first(float("nan"))), "NaN"),
    "infinite rows": (_set("1.new", _first(float("inf"))), "infinity"),
    "duplicate ids": (_set("1.ids", _repeat_first), "each once"),
    "descending ids": (_set("1.ids", lambda ids: ids.flip(0)), "ascend"),
    "a negative id": (_set("1.ids", _first(-1)), "0 to 255"),
    "an id past the end": (_set("1.ids", lambda ids: ids + 256), "0 to 255"),
    "64-bit ids": (_set("1.ids", Tensor.long), "int32"),
    "an id too many": (_set("1.ids", lambda ids: torch.arange(len(ids) + 1)), "one row of width 32"),
    "narrow rows": (_set("1.new", lambda rows: rows[:, :16]), "width 32"),
    "double rows": (_set("1.new", Tensor.double), "float64"),
    "a NaN scale": (_set("2.scale.new", _first(float("nan"))), "scale must be finite"),
    "a wide scale": (_set("2.scale.new", lambda scale: torch.ones(3)), "like the memory's"),
    "a row from nowhere": (
        lambda tensors, header: tensors.update(OLD_ROW | {"1.old_at": _places(999)}),
        "a place of its own",
    ),
    "a row before the first": (
        lambda tensors, header: tensors.update(OLD_ROW | {"1.old_at": _places(-1)}),
        "a place of its",
    ),
    "a NaN old row": (
        lambda tensors, header: tensors.update({"1.old": torch.full((1, 32), float("nan")), "1.old_at": _places(0)}),
        "finite",
    ),
    "a NaN old scale": (
        lambda tensors, header: tensors.update({"2.scale.old": torch.full((1,), float("nan"))}),
        "finite",
    ),
    "no base": (lambda tensors, header: header.pop("base_hash"), "base_hash"),
    "no metadata": (lambda tensors, header: header.pop("metadata"), "metadata"),
    "no hash of what is frozen": (lambda tensors, header: header["layers"]["1"].pop("frozen"), "layers"),
    "no layer at all": (lambda tensors, header: header.update(layers={}), "not those of its config"),
    "a layer too few": (lambda tensors, header: header["layers"].pop("1"), "not those of its config"),
    "no target modules": (lambda tensors, header: header["config"].update(target_modules=None), "not a valid patch"),
    "stored in another dtype": (lambda tensors, header: header.update(stored="int8"), "stored"),
    "no new rows": (lambda tensors, header: tensors.pop("1.new"), "not a valid patch"),
    "no layers": (lambda tensors, header: header.update(layers=[1]), "not whole: .*layers"),
    "an unknown option": (lambda tensors, header: header["config"].update(colour="red"), "colour"),
    "an odd k_dim": (lambda tensors, header: header["config"].update(k_dim=3), "k_dim must be even"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_patch_that_cannot_be_right_is_refused_though_its_checksum_is(case: str, patch_file: Path):
    tensors, header = read_file(patch_file)
    forge(patch_file, tensors, header)
    smf.load_patch(patch_file)  # the forger works
    change, message = FORGED[case]
    change(tensors, header)
    forge(patch_file, tensors, header)
    with pytest.raises(smf.PatchError, match=message):
        smf.load_patch(patch_file)


def test_a_model_without_memory_has_no_patch(tmp_path: Path):
    with pytest.raises(smf.PatchError, match="no memory layers"):
        smf.save_patch(tiny_base(), tmp_path / "a.smf")


def test_a_model_that_was_cast_to_float64_has_a_patch_of_its_own_dtype(tmp_path: Path):
    model = tiny_model(init="paper", train="rows+scale").double()
    before = {layer: memory.values.clone() for layer, memory in smf.memory_layers(model).items()}
    train(model)
    after = {layer: memory.values.clone() for layer, memory in smf.memory_layers(model).items()}
    smf.save_patch(model, tmp_path / "a.smf").revert(model)
    assert all(torch.equal(memory.values, before[layer]) for layer, memory in smf.memory_layers(model).items())
    smf.load_patch(tmp_path / "a.smf").apply(model)
    assert all(torch.equal(memory.values, after[layer]) for layer, memory in smf.memory_layers(model).items())


def test_a_model_that_was_cast_down_is_refused_before_a_file_is_written(tmp_path: Path):
    model = tiny_model().bfloat16()  # its config says float32
    with pytest.raises(smf.PatchError, match=r"bfloat16.*float32"):
        smf.save_patch(model, tmp_path / "a.smf")
    assert not list(tmp_path.iterdir())


def test_another_start_than_the_trained_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(init="paper")
    train(model)
    smf.save_patch(model, tmp_path / "a.smf")
    draw = torch.Tensor.uniform_
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda t, *args, **kw: draw(t, *args, **kw).mul_(1.0001))
    with pytest.raises(smf.PatchError, match="other initial values"):
        smf.load_patch(tmp_path / "a.smf")


def test_patches_of_wrapped_models_know_the_same_base(tmp_path: Path):
    model = tiny_model()
    train(model)
    plain = smf.save_patch(model, tmp_path / "a.smf")
    wrapped = smf.save_patch(torch.compile(model), tmp_path / "b.smf")
    assert plain.metadata["base_hash"] == wrapped.metadata["base_hash"]


def test_a_failed_save_leaves_the_old_file(patch_file: Path, monkeypatch: pytest.MonkeyPatch):
    content = patch_file.read_bytes()
    model = tiny_model()
    train(model)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        smf.save_patch(model, patch_file)
    assert patch_file.read_bytes() == content
    assert [p.name for p in patch_file.parent.iterdir()] == ["a.smf"]
