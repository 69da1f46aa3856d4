"""Provenance: which examples wrote which rows is what their gradients say, and what a patch does with it."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Trainer

import smf
from conftest import batch, tiny_base, tiny_config, tiny_model, train, trainer_arguments
from smf import patch_cli
from smf.errors import ConfigError, PatchError, TrainingError
from smf.files import read_tensors, write_tensors
from smf.fingerprint import json_hash, tensors_hash
from smf.gradient import parts_by_example, row_gradient
from smf.patch_file import FORMAT
from smf.provenance import EVERY, KEPT, REST, Sums, Writers, unpair


def with_ids(seed: int, ids: list[int]) -> dict[str, Tensor]:
    return batch(rows=len(ids), seed=seed) | {"example_ids": torch.tensor(ids)}


def taught(model: torch.nn.Module, groups: list[list[int]], **options: object) -> smf.SparseMemoryOptimizer:
    """A step for each group of examples; an example's tokens are drawn by its id."""
    options = {"lr": 1e-2, "rule": "tf", "rows_per_step": 8, "provenance": True} | options
    optimizer = smf.SparseMemoryOptimizer(model, **options)  # type: ignore[arg-type]
    model.train()
    for group in groups:
        drawn = [batch(rows=1, seed=100 + i) for i in group]
        inputs = {key: torch.cat([one[key] for one in drawn]) for key in drawn[0]}
        model(**inputs, example_ids=torch.tensor(group)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


def tables(model: torch.nn.Module) -> dict[int, Tensor]:
    return {layer: memory.values.detach().clone() for layer, memory in smf.memory_layers(model).items()}


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_parts_are_the_gradients_of_each_example_alone():
    """An example's part of a row's gradient is the row's gradient with all other examples' loss left out."""
    model = tiny_model(base={"attention_dropout": 0.0})
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", provenance=True)
    model.train()
    inputs = with_ids(3, [7, 2, 7, 0])
    memories = smf.memory_layers(model)
    every = torch.arange(256)

    def factors_of(rows: list[int]) -> dict:
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="none"
        ).view(4, -1)
        losses[rows].sum().backward()
        return {layer: memory.take() for layer, memory in memories.items()}

    together = factors_of([0, 1, 2, 3])
    for number, rows in ((7, [0, 2]), (2, [1]), (0, [3])):
        alone = factors_of(rows)
        for layer, memory in memories.items():
            expected = row_gradient(alone[layer], every, memory.values).norm(dim=-1).double()
            pairs, norms = parts_by_example(together[layer], every, memory.values)
            row, example = unpair(pairs)
            got = torch.zeros(256, dtype=torch.float64)
            got[row[example == number]] = norms[example == number]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-9)
    optimizer.zero_grad()


def test_one_example_a_step_writes_what_the_step_wrote():
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8, provenance=True)
    model.train()
    wrote: dict[tuple[int, int], set[str]] = {}
    way: dict[tuple[int, int], float] = {}
    for step, example in enumerate([4, 9, 4, 1, 0]):
        before = tables(model)
        model(**batch(rows=1, seed=step), example_ids=torch.tensor([example])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_step is not None
        for layer, rows in optimizer.last_step.rows.items():
            moved = (tables(model)[layer][rows].double() - before[layer][rows].double()).norm(dim=-1)
            for row, distance in zip(rows.tolist(), moved.tolist(), strict=True):
                wrote.setdefault((layer, row), set()).add(str(example))
                way[layer, row] = way.get((layer, row), 0.0) + distance
    patch = smf.patch_file.patch_of(model)
    assert patch.provenance is not None
    assert patch.provenance.names == ["0", "1", "4", "9"]
    for layer, rows in patch.rows.items():
        ends = patch.provenance.counts[layer].cumsum(0)
        for place, row in enumerate(rows.tolist()):
            found = patch.why(layer, row)
            assert set(found) == wrote[layer, row]
            assert sum(found.values()) == pytest.approx(1)
            assert list(found.values()) == sorted(found.values(), reverse=True)
            some = slice(int(ends[place] - patch.provenance.counts[layer][place]), int(ends[place]))
            assert float(patch.provenance.moved[layer][some].double().sum()) == pytest.approx(way[layer, row], rel=1e-2)
    assert {(layer, row) for layer, rows in patch.rows.items() for row in rows.tolist()} == set(wrote)


@pytest.mark.parametrize("options", [{}, {"update": "sgd"}, {"rule": "all"}, {"select_every": "micro"}])
def test_keeping_provenance_changes_nothing_else(options):
    plain, watched = tiny_model(), tiny_model()
    train(plain, steps=3, **options)
    optimizer = smf.SparseMemoryOptimizer(
        watched, **({"lr": 1e-2, "rule": "tf", "rows_per_step": 8, "provenance": True} | options)
    )
    watched.train()
    for i in range(3):
        watched(**batch(seed=i), example_ids=torch.arange(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, table in tables(plain).items():
        assert torch.equal(table, tables(watched)[layer])


def test_micro_batches_and_one_batch_know_the_same_writers():
    together, apart = tiny_model(), tiny_model()
    for model, parts in ((together, [[0, 1, 2, 3]]), (apart, [[0, 1], [2, 3]])):
        optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=16, provenance=True)
        model.train()
        for part in parts:
            some = {key: tensor[part] for key, tensor in batch().items()}
            (model(**some, example_ids=torch.tensor(part)).loss * len(part) / 4).backward()
        optimizer.step()
    a, b = smf.patch_file.patch_of(together), smf.patch_file.patch_of(apart)
    for layer, rows in a.rows.items():
        assert torch.equal(rows, b.rows[layer])
        for row in rows.tolist():
            assert a.why(layer, row) == pytest.approx(b.why(layer, row), rel=2e-2)


def test_packed_examples_by_token():
    """Ids by token: the tokens of the second half of each sequence are of another example."""
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="all", provenance=True)
    model.train()
    inputs = batch(rows=2, length=16)
    ids = torch.tensor([[0] * 8 + [1] * 8, [2] * 8 + [3] * 8])
    model(**inputs, example_ids=ids).loss.backward()
    (first, *_), layer = smf.memory_layers(model)[1]._pending, 1
    assert first.examples_T is not None and torch.equal(first.examples_T, ids.flatten())
    optimizer.step()
    patch = smf.patch_file.patch_of(model)
    assert patch.provenance is not None and patch.provenance.names == ["0", "1", "2", "3"]
    idx, mask = first.idx_TR, first.g_TD.norm(dim=-1) > 0
    for row in patch.rows[layer].tolist():
        readers = {str(int(i)) for i in first.examples_T[(idx == row).any(-1) & mask]}
        assert set(patch.why(layer, row)) == readers


def test_activation_checkpointing():
    plain, checkpointed = tiny_model(), tiny_model()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    taught(plain, [[0, 1], [2, 3]])
    taught(checkpointed, [[0, 1], [2, 3]])
    a, b = smf.patch_file.patch_of(plain), smf.patch_file.patch_of(checkpointed)
    assert all(a.why(layer, int(row)) == b.why(layer, int(row)) for layer, rows in a.rows.items() for row in rows)
    reentrant = tiny_model()
    reentrant.enable_input_require_grads()
    reentrant.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        taught(reentrant, [[0, 1]])
    # two forward passes of unequal size before one backward pass, as preference losses do
    twice = tiny_model()
    twice.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = smf.SparseMemoryOptimizer(twice, lr=1e-2, rule="all", provenance=True)
    twice.train()
    losses = [twice(**batch(rows=n, seed=n), example_ids=torch.arange(n) + 10 * n).loss for n in (4, 3)]
    sum(losses).backward()  # type: ignore[union-attr]
    optimizer.step()
    known = smf.patch_file.patch_of(twice).provenance
    assert known is not None and known.names == ["30", "31", "32", "40", "41", "42", "43"]


def test_a_resumed_training_knows_what_was_before():
    whole, half = tiny_model(), tiny_model()
    taught(whole, [[0, 1], [2, 3], [1, 4]])
    optimizer = taught(half, [[0, 1], [2, 3]])
    state = copy.deepcopy(optimizer.state_dict())
    again = smf.SparseMemoryOptimizer(half, lr=1e-2, rule="tf", rows_per_step=8, provenance=True)
    again.load_state_dict(state)
    half.train()
    drawn = [batch(rows=1, seed=100 + i) for i in (1, 4)]
    inputs = {key: torch.cat([one[key] for one in drawn]) for key in drawn[0]}
    half(**inputs, example_ids=torch.tensor([1, 4])).loss.backward()
    again.step()
    a, b = smf.patch_file.patch_of(whole), smf.patch_file.patch_of(half)
    assert a.provenance is not None and b.provenance is not None
    for part in ("counts", "examples", "moved", "rest"):
        for layer in a.rows:
            assert torch.equal(getattr(a.provenance, part)[layer], getattr(b.provenance, part)[layer])
    blind = tiny_model()
    state = copy.deepcopy(train(blind).state_dict())
    with pytest.raises(ConfigError, match="knows no provenance; go on with provenance=False"):
        smf.SparseMemoryOptimizer(blind, lr=1e-2, rule="tf", provenance=True).load_state_dict(state)
    with pytest.raises(ConfigError, match="has provenance; go on with provenance=True"):
        smf.SparseMemoryOptimizer(half, lr=1e-2, rule="tf").load_state_dict(again.state_dict())


def test_with_trainer(tmp_path: Path):
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8, provenance=True)
    data = [{k: v[0] for k, v in batch(rows=1, seed=i).items()} | {"example_ids": 30 + i} for i in range(4)]
    arguments = trainer_arguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]
    patch = smf.patch_file.patch_of(model)
    assert patch.provenance is not None and patch.provenance.names == ["30", "31", "32", "33"]
    with torch.no_grad():  # evaluation takes the ids too, and looks at none
        model.eval()
        model(**batch(), example_ids=torch.arange(4))


def noted(steps: int, rows: int, examples: int, resumed: bool = False) -> tuple[Sums, Tensor]:
    """What is kept of random steps, and what each example moved each row."""
    writers, ids = Writers([0]), torch.arange(rows)
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(rows, examples, dtype=torch.float64)
    for step in range(steps):
        if resumed and step % 7 == 3:
            state = copy.deepcopy(writers.state_dict())
            writers = Writers([0])
            writers.load_state_dict(state)
        example = torch.randint(0, examples, (rows,), generator=generator)
        moved = torch.rand(rows, generator=generator)
        writers.note(0, ids, moved, [((ids << 32) | example, torch.ones(rows, dtype=torch.float64))])
        expected[ids, example] += moved
    return writers.of(0), expected


def test_what_was_noted_is_added_up():
    sums, expected = noted(steps=40, rows=50, examples=3)
    row, example = unpair(sums.pairs)
    torch.testing.assert_close(sums.moved, expected[row, example])
    assert len(row) == int((expected > 0).sum()) and len(sums.rows) == 0


@pytest.mark.parametrize("steps", [200, EVERY + 50])
def test_of_a_row_with_many_writers_the_largest_are_kept(steps: int):
    sums, expected = noted(steps=steps, rows=6, examples=150)
    row, example = unpair(sums.pairs)
    assert torch.bincount(row).tolist() == [KEPT] * 6 and sums.rows.tolist() == list(range(6))
    by_row = torch.zeros(6, dtype=torch.float64).index_add_(0, row, sums.moved) + sums.rest
    torch.testing.assert_close(by_row, expected.sum(1))
    if steps < EVERY:  # never cut before: the largest are the largest of all
        for each in range(6):
            largest = set(expected[each].topk(KEPT).indices.tolist())
            assert set(example[row == each].tolist()) == largest
    again, _ = noted(steps=steps, rows=6, examples=150, resumed=True)
    assert torch.equal(again.pairs, sums.pairs)
    torch.testing.assert_close(again.moved, sums.moved)


def test_a_row_that_unnamed_examples_wrote_is_nobodys_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smf.provenance.KEPT", 2)
    model = tiny_model()
    taught(model, [[0, 1, 2, 3], [4, 5]])
    patch = smf.save_patch(model, tmp_path / "a.smf")
    assert patch.provenance is not None
    everyone = patch.written_by(patch.provenance.names)
    crowded = 0
    for layer, rows in patch.rows.items():
        for row in rows.tolist():
            found = patch.why(layer, row)
            assert sum(found.values()) == pytest.approx(1, abs=0.01) and len(found) <= 3
            crowded += REST in found
            assert (row in everyone.rows[layer].tolist()) == (REST not in found)
    assert crowded > 0
    again = smf.load_patch(tmp_path / "a.smf")
    assert all(again.why(n, int(row)) == patch.why(n, int(row)) for n, rows in patch.rows.items() for row in rows)


def test_refusals_while_training():
    with pytest.raises(ConfigError, match="masked-adam"):
        smf.SparseMemoryOptimizer(tiny_model(), lr=1.0, rule="tf", update="masked-adam", provenance=True)
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1.0, rule="tf", provenance=True)
    model.train()
    for ids in (None, torch.rand(4), torch.tensor([0, 1, -1, 2]), torch.tensor([0, 1, 2, 2**32]), torch.tensor(1)):
        with pytest.raises(TrainingError, match="must have example_ids"):
            model(**batch(), example_ids=ids)
    for shape in ((3,), (2,), (8,), (16,), (64,), (16, 4), (1, 16), (2, 16), (4, 15)):
        with pytest.raises(TrainingError, match=r"for each of its sequences or tokens \(4, 16\); got torch.int64"):
            model(**batch(), example_ids=torch.zeros(shape, dtype=torch.int64))
    model.get_base_model()(**batch()).loss.backward()
    with pytest.raises(TrainingError, match="does not know whose tokens"):
        optimizer.step()
    optimizer.zero_grad()
    del optimizer  # nothing asks for ids any more
    model(**batch())
    plain = smf.SparseMemoryOptimizer(model, lr=1.0, rule="tf")  # another optimizer, which does not ask for them
    model(**batch()).loss.backward()
    plain.step()
    with pytest.raises(PatchError, match="without provenance"):
        smf.save_patch(model, "never", examples=["a"])


# -- in patches -------------------------------------------------------------------------------------------------------


@pytest.fixture
def patch(tmp_path: Path) -> smf.Patch:
    model = tiny_model()
    taught(model, [[0, 1], [2, 3], [0, 2], [4]])
    return smf.save_patch(model, tmp_path / "patch.smf", examples=["zero", "one", "two", "three", "four", "unused"])


def test_save_load_save_is_byte_equal(patch: smf.Patch, tmp_path: Path):
    first = (tmp_path / "patch.smf").read_bytes()
    loaded = smf.load_patch(tmp_path / "patch.smf")
    smf.save_patch(loaded, tmp_path / "again.smf")
    assert (tmp_path / "again.smf").read_bytes() == first
    assert all(patch.why(n, int(row)) == loaded.why(n, int(row)) for n, rows in patch.rows.items() for row in rows)


def test_a_part_and_the_rest_are_the_whole(patch: smf.Patch):
    assert patch.provenance is not None
    theirs, rest = patch.written_by(["one", "four"]), patch.without(patch.written_by(["one", "four"]))
    for layer, rows in patch.rows.items():
        for row in rows.tolist():
            only_they = set(patch.why(layer, row)) <= {"one", "four"}
            assert (row in theirs.rows[layer].tolist()) == only_they
            assert (row in rest.rows[layer].tolist()) == (not only_they)
            if not only_they:
                assert rest.why(layer, row) == patch.why(layer, row)
    assert sum(map(len, theirs.rows.values())) > 0
    whole, parted = tiny_model(), tiny_model()
    patch.apply(whole)
    rest.apply(parted)
    theirs.apply(parted)
    assert all(torch.equal(table, tables(parted)[layer]) for layer, table in tables(whole).items())
    theirs.revert(whole)
    rest.revert(whole)
    assert all(torch.equal(table, torch.zeros_like(table)) for table in tables(whole).values())
    everyone = patch.written_by(patch.provenance.names)
    assert all(torch.equal(rows, everyone.rows[layer]) for layer, rows in patch.rows.items())
    none = patch.without(everyone)
    assert sum(map(len, none.rows.values())) == 0


def test_a_share_takes_more_rows(patch: smf.Patch):
    sizes = [sum(map(len, patch.written_by(["two"], share).rows.values())) for share in (1e-9, 0.3, 0.7, 1.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    half = patch.written_by(["two"], 0.5)
    for layer, rows in patch.rows.items():
        for row in rows.tolist():
            assert (row in half.rows[layer].tolist()) == (patch.why(layer, row).get("two", 0) >= 0.5)


def test_the_scale_stays(tmp_path: Path):
    """A part of a patch has rows only: taking it out leaves the scale as the training left it."""
    model = tiny_model(train="rows+scale")
    taught(model, [[0, 1], [2]])
    patch = smf.save_patch(model, tmp_path / "patch.smf")
    scale = smf.memory_layers(model)[1].tensor("scale").detach().clone()
    assert float(scale) != 1.0
    theirs = patch.written_by(["2"])
    smf.save_patch(theirs, tmp_path / "part.smf")
    smf.load_patch(tmp_path / "part.smf").revert(model)
    assert torch.equal(smf.memory_layers(model)[1].tensor("scale"), scale)
    patch.without(theirs).revert(model)
    assert smf.memory_layers(model)[1].tensor("scale").item() == 1.0
    assert all(torch.equal(table, torch.zeros_like(table)) for table in tables(model).values())


def test_merged_patches_know_both(tmp_path: Path):
    first, second = tiny_model(), tiny_model()
    taught(first, [[0, 1]])
    taught(second, [[1, 2], [5]])
    a = smf.save_patch(first, tmp_path / "a.smf")
    b = smf.save_patch(second, tmp_path / "b.smf")
    merged = smf.save_patch(a.merge(b, policy="sum"), tmp_path / "merged.smf")
    assert merged.provenance is not None and merged.provenance.names == ["0", "1", "2", "5"]
    last = a.merge(b, policy="last")
    for layer, rows in b.rows.items():
        for row in rows.tolist():  # what is left of it is what the last one wrote
            assert last.why(layer, row) == pytest.approx(b.why(layer, row), rel=1e-2)
    for layer, rows in merged.rows.items():
        for row in rows.tolist():
            writers = set()
            for part in (a, b):
                writers |= set(part.why(layer, row)) if row in part.rows[layer].tolist() else set()
            assert set(merged.why(layer, row)) == writers
    blind = tiny_model()
    train(blind)
    assert a.merge(smf.patch_file.patch_of(blind), policy="sum").provenance is None


def test_refusals_of_patches(patch: smf.Patch, tmp_path: Path):
    blind = tiny_model()
    train(blind)
    unknown = smf.save_patch(blind, tmp_path / "blind.smf")
    for ask in (lambda: unknown.why(1, int(unknown.rows[1][0])), lambda: unknown.written_by(["0"])):
        with pytest.raises(PatchError, match="does not know which examples"):
            ask()
    for name in ("five", "unused"):
        with pytest.raises(PatchError, match=f"'{name}'"):
            patch.written_by(["one", name])
    for wrong in ("one", [1], ["one", None]):
        with pytest.raises(ConfigError, match="several names"):
            patch.written_by(wrong)  # type: ignore[arg-type]
    one_layer = tiny_model(layers=[1])
    train(one_layer)
    with pytest.raises(PatchError, match=r"the part is of layers \[1\]"):
        patch.without(smf.patch_file.patch_of(one_layer))
    for share in (0, 1.1, -1, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            patch.written_by(["one"], share)
    unwritten = next(row for row in range(256) if row not in patch.rows[1].tolist())
    for layer, row in ((1, unwritten), (3, 0)):
        with pytest.raises(PatchError, match="does not change row"):
            patch.why(layer, row)
    model = tiny_model()
    taught(model, [[0, 7]])
    wrong = [(["a", "b"], "names of 2 examples only"), (["a"] * 9, "two examples have one name")]
    wrong += [(kind, "a string for each example") for kind in ("abcdefghi", [1] * 9, [["a"]] * 9, [])]
    for names, message in wrong:
        with pytest.raises(PatchError, match=message):
            smf.save_patch(model, tmp_path / "never.smf", examples=names)
    with pytest.raises(PatchError, match="a patch has its names already"):
        smf.save_patch(patch, tmp_path / "never.smf", examples=["a"])
    assert not (tmp_path / "never.smf").exists()


def _first(value: int):
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[0] = value
        return tensor

    return change


BROKEN = {
    "a count too many": ("1.writers.counts", _first(100)),
    "a count below zero": ("1.writers.counts", lambda t: torch.cat([-t[:1], t[1:-1], t[-1:] + 2 * t[:1]])),
    "a row without count": ("1.writers.counts", lambda t: t[1:]),
    "an unknown example": ("1.writers.examples", _first(6)),
    "an example below zero": ("1.writers.examples", _first(-1)),
    "an example twice": ("2.writers.examples", lambda t: torch.zeros_like(t)),
    "not a number": ("1.writers.moved", _first(float("nan"))),  # type: ignore[arg-type]
    "another kind of number": ("1.writers.moved", lambda t: t.float()),
    "no writers": ("1.writers.moved", None),
    "names that are none": ("examples", lambda t: torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)),
    "a name twice": ("examples", lambda t: torch.frombuffer(bytearray(b'["a", "a"]'), dtype=torch.uint8)),
    "names cut off": ("examples", lambda t: t[:-1]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_refused(patch: smf.Patch, tmp_path: Path, broken: str):
    header, tensors = read_tensors(tmp_path / "patch.smf", "patch", FORMAT, PatchError)
    name, change = BROKEN[broken]
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    header = {key: value for key, value in header.items() if key != "checksum"} | {"tensors": tensors_hash(tensors)}
    write_tensors(tmp_path / "broken.smf", tensors, "patch", header | {"checksum": json_hash(header)})
    with pytest.raises(PatchError):
        smf.load_patch(tmp_path / "broken.smf")


# -- the command ------------------------------------------------------------------------------------------------------


def test_why_and_forget_on_the_command_line(patch: smf.Patch, tmp_path: Path, capsys: pytest.CaptureFixture):
    file, row = tmp_path / "patch.smf", int(patch.rows[2][0])
    patch_cli.main(["inspect", str(file), "--why", f"2:{row}", str(int(patch.rows[1][0]))])
    shown = capsys.readouterr().out
    assert f"Row {row} of layer 2" in shown and all(name in shown for name in patch.why(2, row))
    patch_cli.main(["inspect", str(file), "--why", f"2:{row}", "--format", "json"])
    assert f'"2:{row}"' in capsys.readouterr().out
    for wrong, message in (
        ("two", "expected ROW"),
        ("1:x", "expected ROW"),
        ("9" * 20, "expected ROW"),
        ("1:" + "9" * 5000, "expected ROW"),
        ("1:9999999999", "does not change"),
        ("9:1", "does not change"),
        ("999", "none"),
    ):
        with pytest.raises(PatchError, match=message):
            patch_cli.main(["inspect", str(file), "--why", wrong])
    patch_cli.main(["forget", str(file), "--examples", "four", "one", "--output", str(tmp_path / "rest.smf")])
    assert "reverted" in capsys.readouterr().out
    rest, expected = smf.load_patch(tmp_path / "rest.smf"), patch.without(patch.written_by(["four", "one"]))
    assert all(torch.equal(rest.rows[layer], rows) for layer, rows in expected.rows.items())
    model = smf.load(tiny_base(), rest)
    assert all(torch.equal(tables(model)[n][rows], expected.new[n]) for n, rows in expected.rows.items())


def test_what_the_page_says_of_provenance_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[1] / "docs" / "patches.md").read_text()
    page = page.partition("## Which examples wrote which rows")[2].partition("\n## ")[0]
    example, commands = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[-1] for kind in ("python", "sh"))
    monkeypatch.chdir(tmp_path)
    model = tiny_model(layers=[1, 3])
    background = smf.read_background(model, [batch(4, 12)])
    names = {"smf": smf, "torch": torch, "model": model, "background": background, "batch": batch(rows=2)}
    before = tables(model)
    example, (shown,) = example.replace("(4, 1207)", "(1, int(patch.rows[1][0]))"), re.findall(r"patch.why.*", example)
    assert "4, 1207" in shown
    exec(example, names | {"names": [f"q{number}" for number in range(100)]})
    patch = smf.load_patch("medicine.smf")
    theirs = {"q17", "q99"}  # all there are: nothing is left
    assert all(set(patch.why(1, row)) <= theirs for row in patch.rows[1].tolist())
    assert all(torch.equal(table, before[layer]) for layer, table in tables(model).items())
    for line in commands.replace("4:1207", f"1:{int(patch.rows[1][0])}").strip().splitlines():
        patch_cli.main(shlex.split(line, comments=True)[2:])
    assert sum(map(len, smf.load_patch("smaller.smf").rows.values())) == 0


def test_forgotten_names_are_not_in_the_file(patch: smf.Patch, tmp_path: Path):
    assert b'"four"' in (tmp_path / "patch.smf").read_bytes()
    assert b'"unused"' not in (tmp_path / "patch.smf").read_bytes()
    everything_of_four = patch.written_by(["four"], 1e-9)
    smf.save_patch(patch.without(everything_of_four), tmp_path / "rest.smf")
    assert b'"four"' not in (tmp_path / "rest.smf").read_bytes()


def test_steps_without_movement_are_nobodys_share():
    """Rows that no step moved are of nobody's share; of those that later moved, it is of who moved them."""
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="all", weight_decay=0.1, provenance=True)
    model.train()
    for rate, ids in ((0.0, [0, 1, 2, 3]), (1e-2, [4, 5, 6, 7])):
        optimizer.param_groups[0]["lr"] = rate
        model(**batch(seed=ids[0]), example_ids=torch.tensor(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    patch = smf.patch_file.patch_of(model)
    for layer, rows in patch.rows.items():
        for row in rows.tolist():
            shares = patch.why(layer, row)
            assert sum(shares.values()) == pytest.approx(1)
    first = patch.written_by(["0", "1", "2", "3"], 0.01)
    moved = [
        row for layer, rows in patch.rows.items() for row in rows.tolist() if not {*patch.why(layer, row)} & {*"4567"}
    ]
    assert sum(map(len, first.rows.values())) <= len(moved)


def test_several_adapters_have_ids_of_their_own():
    model = tiny_model()
    model.add_adapter("second", tiny_config(layers=[3]))
    model.base_model.set_adapter(["default", "second"])
    first, second = (
        smf.SparseMemoryOptimizer(model, lr=1e-2, rule="all", provenance=True, adapter=adapter)
        for adapter in ("default", "second")
    )
    model.train()
    model(**batch(), example_ids=torch.arange(4)).loss.backward()
    first.step()
    second.step()
    for adapter in ("default", "second"):
        known = smf.patch_file.patch_of(model, adapter).provenance
        assert known is not None and known.names == ["0", "1", "2", "3"]


def test_pads_of_packed_batches_may_have_any_id():
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="all", provenance=True)
    model.train()
    inputs, ids = batch(rows=2, length=16), torch.ones(2, 16, dtype=torch.int64)
    inputs["attention_mask"][1, 10:], inputs["labels"][1, 10:], ids[1, 10:] = 0, -100, -100
    model(**inputs, example_ids=ids).loss.backward()
    optimizer.step()
    known = smf.patch_file.patch_of(model).provenance
    assert known is not None and known.names == ["1"]


def test_embeddings_in_place_of_ids():
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8, provenance=True)
    model.train()
    rows = batch()
    embeds = model.get_input_embeddings()(rows["input_ids"])
    model(input_ids=None, inputs_embeds=embeds, labels=rows["labels"], example_ids=torch.arange(4)).loss.backward()
    optimizer.step()
    known = smf.patch_file.patch_of(model).provenance
    assert known is not None and set(known.names) == {"0", "1", "2", "3"}
