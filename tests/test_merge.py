"""Patches with one another: joined in sequence, merged by policy, compared; and refused where they do not belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

import smf
from conftest import tiny_base, tiny_config, tiny_model, train
from smf.row_sets import RowSet, merge_rows, overlap, same_rows

Rows = dict[int, list[float]]  # id -> row
few = settings(deadline=None, max_examples=60)
values = st.integers(-4, 4).map(float)
changes = st.dictionaries(st.integers(0, 9), st.tuples(values, values), max_size=8)


def made(changes: dict[int, tuple[float, float]], before: Tensor) -> RowSet:
    """Rows set to such values, those that already had them left out."""
    ids = torch.tensor(sorted(changes), dtype=torch.int64)
    new = torch.tensor([changes[int(i)] for i in ids]).reshape(-1, 2)
    rows = RowSet(ids, before[ids], new)
    return rows.take(~same_rows(rows.old_RD, rows.new_RD))


def after(rows: RowSet, before: Tensor) -> Tensor:
    table = before.clone()
    table[rows.ids_R] = rows.new_RD
    return table


@few
@given(changes, changes)
def test_trained_in_sequence_a_merge_does_what_both_do(one: dict, two: dict):
    table = torch.zeros(10, 2)
    first = made(one, table)
    second = made(two, after(first, table))
    merged, clashes = merge_rows([first, second], "refuse", [1, 1], "the table")
    assert torch.equal(after(merged, table), after(second, after(first, table))) and len(clashes) == 0
    assert torch.equal(merged.old_RD, table[merged.ids_R]) and not bool(same_rows(merged.old_RD, merged.new_RD).any())


@few
@given(changes, changes, st.sampled_from(["sum", "weighted", "last"]))
def test_trained_apart_rows_of_one_are_kept_and_rows_of_both_are_settled(one: dict, two: dict, policy):
    table = torch.full((10, 2), 0.5)
    first, second = made(one, table), made(two, table)
    merged, clashes = merge_rows([first, second], policy, [1.0, 3.0], "the table")
    left, right, result = (after(rows, table) for rows in (first, second, merged))
    both = sorted(set(first.ids_R.tolist()) & set(second.ids_R.tolist()))
    assert clashes.tolist() == both == overlap(first, second).ids_R.tolist()
    expected = torch.where((left != table).any(1, keepdim=True), left, right)
    mixed = {"sum": left + right - table, "weighted": (left + 3 * right) / 4, "last": right}[policy]
    expected[both] = mixed[both]
    assert torch.equal(result, expected)
    if both:
        with pytest.raises(smf.PatchError, match=rf"{len(both)} rows of the table are changed by patch 2 and by an"):
            merge_rows([first, second], "refuse", [1, 1], "the table")


def test_weights_count_for_three():
    table = torch.zeros(1, 2)
    sets = [made({0: (float(x), 0.0)}, table) for x in (1, 2, 4)]
    merged, _ = merge_rows(sets, "weighted", [1, 2, 1], "the table")
    assert merged.new_RD.tolist() == [[(1 + 4 + 4) / 4, 0.0]]


def test_rows_trained_from_other_values_are_named():
    sets = [made({3: (1.0, 1.0)}, torch.zeros(5, 2)), made({3: (2.0, 2.0)}, torch.full((5, 2), 0.25))]
    with pytest.raises(smf.PatchError, match=r"1 rows of layer 7, such as rows \[3\], were trained by patch 2"):
        merge_rows(sets, "last", [1, 1], "layer 7")


# -- of models --------------------------------------------------------------------------------------------------------


def patch(path: Path, seed: int, *, model: nn.Module | None = None, lr: float = 0.1, **config: object) -> smf.Patch:
    """Of one training; two of one config and different seeds share rows."""
    model = tiny_model(**config) if model is None else model
    train(model, steps=3, seed=seed, lr=lr)
    return smf.save_patch(model, path / f"{seed}.smf", seed=seed)


def state(model: nn.Module) -> dict[int, Tensor]:
    return {layer: memory.values.detach().clone() for layer, memory in smf.memory_layers(model).items()}


def equal(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[layer], b[layer]) for layer in a)


@pytest.mark.parametrize("config", [{}, {"init": "paper"}, {"table_dtype": "bfloat16"}], ids=str)
def test_a_merge_of_a_sequence_gives_the_last_model_and_reverts_to_the_first(config: dict, tmp_path: Path):
    model = tiny_model(**config)
    start = state(model)
    first, second = (patch(tmp_path, seed, model=model) for seed in (0, 50))
    merged = first.merge(second, corpus="both")
    fresh = tiny_model(**config)
    merged.apply(fresh)
    assert equal(state(fresh), state(model))
    merged.revert(fresh)
    assert equal(state(fresh), start)
    note = merged.metadata["metadata"]
    assert note["corpus"] == "both" and [each["seed"] for each in note["merged"]] == [0, 50]
    assert note["rows_of_several"] == {"1": 0, "2": 0}


def test_a_merge_is_a_file_like_any_other(tmp_path: Path):
    one, two = patch(tmp_path, 0), patch(tmp_path, 50)
    merged = one.merge(two, policy="sum")
    saved = smf.save_patch(merged, tmp_path / "merged.smf")
    loaded = smf.load_patch(tmp_path / "merged.smf")
    smf.save_patch(loaded, tmp_path / "again.smf")
    assert (tmp_path / "again.smf").read_bytes() == (tmp_path / "merged.smf").read_bytes()
    assert loaded.metadata == saved.metadata and all(torch.equal(loaded.new[i], merged.new[i]) for i in merged.new)
    model = smf.load(tiny_base(), loaded)
    for layer, values_ND in state(model).items():
        expected = torch.zeros_like(values_ND)
        for each in (one, two):
            expected[each.rows[layer]] += each.new[layer]
        torch.testing.assert_close(values_ND, expected)


def test_rows_of_both_are_refused_unless_a_policy_is_chosen(tmp_path: Path):
    one, two = patch(tmp_path, 0), patch(tmp_path, 50)
    shared = {layer: found.ids_R.tolist() for layer, found in one.overlap(two).items()}
    assert all(shared.values())
    with pytest.raises(smf.PatchError, match=r'choose a policy for them: "sum", "weighted" or "last"'):
        one.merge(two)
    merged = one.merge(two, policy="last")
    assert merged.metadata["metadata"]["rows_of_several"] == {str(i): len(ids) for i, ids in shared.items()}
    for layer, ids in shared.items():
        mine = [merged.rows[layer].tolist().index(i) for i in ids]
        theirs = [two.rows[layer].tolist().index(i) for i in ids]
        assert torch.equal(merged.new[layer][mine], two.new[layer][theirs])


def test_overlap_has_sizes_and_directions(tmp_path: Path):
    one = patch(tmp_path, 0)
    found = one.overlap(one)
    for layer, rows in one.rows.items():
        sizes = (one.new[layer] - one.old[layer]).double().norm(dim=1)
        assert torch.equal(found[layer].ids_R, rows)
        torch.testing.assert_close(found[layer].sizes_2R, torch.stack([sizes, sizes]))
        torch.testing.assert_close(found[layer].cosine_R, torch.ones_like(sizes))


def test_diff_says_which_rows_differ_and_how_much(tmp_path: Path):
    one, two = patch(tmp_path, 0), patch(tmp_path, 50)
    for layer, found in one.diff(two).items():
        mine, theirs = set(one.rows[layer].tolist()), set(two.rows[layer].tolist())
        assert set(found.only_first.tolist()) == mine - theirs and set(found.only_second.tolist()) == theirs - mine
        assert set(found.apart.tolist()) == mine & theirs and not len(found.equal) and bool((found.distances > 0).all())
    for layer, found in one.diff(one).items():
        assert torch.equal(found.equal, one.rows[layer]) and not len(found.apart) + len(found.only_first)


def test_scales_are_settled_like_rows(tmp_path: Path):
    config = {"train": "rows+scale"}
    one, two = patch(tmp_path, 0, **config), patch(tmp_path, 50, **config)
    with pytest.raises(smf.PatchError, match="choose a policy"):
        one.merge(two)
    merged = one.merge(two, policy="weighted", weights=[1, 3])
    for layer in one.rows:
        scales = [each.new_others[layer]["scale"].double() for each in (one, two)]
        torch.testing.assert_close(
            merged.new_others[layer]["scale"].double(), (scales[0] + 3 * scales[1]) / 4, rtol=1e-6, atol=0
        )
    smf.load(tiny_base(), merged)


STRANGERS: dict[str, tuple[Callable[[Path], smf.Patch], str]] = {
    "another base": (
        lambda path: patch(path, 1, model=get_peft_model(tiny_base(seed=1), tiny_config())),
        "another base",
    ),
    "another seed": (lambda path: patch(path, 1, model=get_peft_model(tiny_base(), tiny_config(seed=1))), "seed=1"),
    "other layers": (lambda path: patch(path, 1, layers=[1, 3]), r"layers \[1, 3\]"),
    "more keys": (lambda path: patch(path, 1, n_keys=17), "n_keys=17"),
    "the scale too": (lambda path: patch(path, 1, train="rows+scale"), r"changes \['scale'\].*the first rows alone"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_patches_that_do_not_belong_together_are_refused(case: str, tmp_path: Path):
    make, message = STRANGERS[case]
    one, other = patch(tmp_path, 0), make(tmp_path)
    for together in (one.merge, one.diff, one.overlap):
        with pytest.raises(smf.PatchError, match=message):
            together(other)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, -1.0]])
def test_weights_that_are_none_are_refused(weights: list[float], tmp_path: Path):
    one = patch(tmp_path, 0)
    with pytest.raises(smf.ConfigError, match="expected a finite number above 0 for each of 2 patches"):
        one.merge(one, policy="weighted", weights=weights)
    with pytest.raises(smf.ConfigError, match="policy = 'first'"):
        one.merge(one, policy="first")  # type: ignore[arg-type]
