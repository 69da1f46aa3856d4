"""Reads, background and rules, against plain Python counts and formulas."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import smf
from conftest import batch, tiny_base, tiny_config, tiny_model, train
from dense import LENGTHS, dense_twin, double_model, padded, with_labels
from smf import selection
from smf.adapter import SparseMemoryLayer
from smf.patch_file import patch_of
from smf.selection import Reads, select_rows
from smf.shape import seeded

READS_A_TOKEN = 2 * 4  # heads x knn of tiny_config
N_ROWS = 16 * 16
LAYERS = (1, 2)

Counts = dict[int, float]
Score = dict[int, float]


def best(scores: Score, t: int) -> list[int]:
    """The `t` best rows, ties to the lower id."""
    return sorted(sorted(scores, key=lambda row: (-scores[row], row))[:t])


def independent_reads(model: PeftModel, inputs: dict[str, Tensor], kind: str = "hits") -> dict[int, Counts]:
    """Reads of each layer by a dense twin of the model that scores every key."""
    twin, dense = dense_twin(model)
    twin(**inputs).loss.backward()
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return {layer: memory.reads(mask, kind) for layer, memory in dense.items()}


def brute_background(model: PeftModel, batches: list[dict[str, Tensor]]) -> tuple[dict, dict, int]:
    """Hits and document counts `{layer: Counter}` of every row, and the number of documents, token by token."""
    b, df, n_docs = {x: Counter() for x in LAYERS}, {x: Counter() for x in LAYERS}, 0
    seen: dict[int, Tensor] = {}
    memories = smf.memory_layers(model)
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.__setitem__(module.layer, args[0].detach()))
        for module in model.modules()
        if isinstance(module, SparseMemoryLayer)
    ]
    model.eval()
    for inputs in batches:
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            model(**inputs, position_ids=positions)
        n_docs += len(inputs["input_ids"])
        for layer, x in seen.items():
            for doc, mask in enumerate(inputs["attention_mask"].tolist()):
                rows: list[int] = []
                for token in (s for s, real in enumerate(mask) if real):
                    rows += memories[layer].search(x[doc, token][None])[0][0].tolist()
                b[layer].update(rows)
                df[layer].update(set(rows))
    for hook in hooks:
        hook.remove()
    return b, df, n_docs


def kl_by_hand(c: Counts, b: Counts) -> Score:
    total, b_total = sum(c.values()), sum(b.get(row, 0) + 1 for row in range(N_ROWS))
    scores = {}
    for row, count in c.items():
        p, q = count / total, (b.get(row, 0) + 1) / b_total
        scores[row] = p * math.log((p + 1e-8) / (q + 1e-8))
    return scores


def tfidf_by_hand(c: Counts, df: Counts, n_docs: int) -> Score:
    total = sum(c.values())
    return {row: count / total * math.log((n_docs + 1) / (df.get(row, 0) + 1)) for row, count in c.items()}


def one_step(model: PeftModel, inputs: dict[str, Tensor], background: smf.Background | None = None, **options: object):
    model.train()
    optimizer = smf.SparseMemoryOptimizer(model, background, **({"lr": 0.01, "rows_per_step": 20} | options))
    model(**inputs).loss.backward()
    optimizer.step()
    return optimizer


def general_texts() -> list[dict[str, Tensor]]:
    return [padded(seed=7), padded([4, 9, 2], seed=8)]


# -- rules: the functions ---------------------------------------------------------------------------------------------

C_R, B_R, DF_R = torch.tensor([[6, 1, 3], [0, 9, 199], [0, 2, 4]], dtype=torch.float64)
GIVEN = {"b_total": 1000, "n_docs": 4, "generator": seeded(0)}


def test_kl_of_three_rows_by_hand():
    expected = [
        0.6 * math.log((0.6 + 1e-8) / (0.001 + 1e-8)),
        0.1 * math.log((0.1 + 1e-8) / (0.01 + 1e-8)),
        0.3 * math.log((0.3 + 1e-8) / (0.2 + 1e-8)),
    ]
    assert selection.kl(C_R, B_R, DF_R, **GIVEN).tolist() == pytest.approx(expected, rel=1e-14)


def test_kl_is_negative_for_a_row_that_general_text_reads_more_often():
    often = torch.tensor([0.0, 499.0, 0.0], dtype=torch.float64)
    assert selection.kl(C_R, often, DF_R, **GIVEN)[1].item() == pytest.approx(0.1 * math.log(0.1 / 0.5), rel=1e-6)


def test_tfidf_of_three_rows_by_hand():
    expected = [0.6 * math.log(5 / 1), 0.1 * math.log(5 / 3), 0.3 * math.log(5 / 5)]
    assert selection.tfidf(C_R, B_R, DF_R, **GIVEN).tolist() == pytest.approx(expected, rel=1e-14)


def test_tf_is_the_share_of_reads():
    assert selection.tf(C_R, B_R, DF_R, **GIVEN).tolist() == pytest.approx([0.6, 0.1, 0.3], rel=1e-15)


@pytest.mark.parametrize("rule", ["kl", "tfidf", "tf"])
def test_reads_without_any_mass_score_finite(rule):
    assert selection.RULES[rule](C_R * 0, B_R, DF_R, **GIVEN).tolist() == [0, 0, 0]


# -- selection --------------------------------------------------------------------------------------------------------

SCORES = st.sampled_from([-2.0, -0.5, -0.0, 0.0, 0.5, 1.0]) | st.floats(-10, 10)


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 500), SCORES, min_size=1, max_size=40), st.integers(1, 45))
def test_selected_rows_are_the_best_by_score_then_id(scores, t):
    rows = sorted(scores)
    hits_R = torch.ones(len(rows), dtype=torch.int64)
    reads = Reads(torch.tensor(rows), hits_R.double(), hits_R)
    chosen = select_rows(reads, torch.tensor([scores[row] for row in rows], dtype=torch.float64), t)
    assert chosen.tolist() == best(scores, t)


def test_equal_scores_go_to_the_lower_ids():
    rows = torch.arange(0, 3000, 3)
    reads = Reads(rows, torch.ones(1000, dtype=torch.float64), torch.ones(1000, dtype=torch.int64))
    assert select_rows(reads, torch.zeros(1000, dtype=torch.float64), 7).tolist() == [0, 3, 6, 9, 12, 15, 18]


# -- rules through a real step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hits", "gradient"])
@pytest.mark.parametrize("rule", ["kl", "tfidf", "tf"])
def test_a_step_chooses_the_rows_that_a_hand_computation_chooses(rule, kind):
    model, inputs = double_model(), with_labels(padded())
    b, df, n_docs = brute_background(model, general_texts())
    counts = independent_reads(model, inputs, kind)
    background = smf.read_background(model, general_texts())
    optimizer = one_step(model, inputs, None if rule == "tf" else background, rule=rule, reads=kind)
    for layer in LAYERS:
        scores = {
            "kl": kl_by_hand(counts[layer], b[layer]),
            "tfidf": tfidf_by_hand(counts[layer], df[layer], n_docs),
            "tf": counts[layer],
        }[rule]
        assert optimizer.last_step.rows[layer].tolist() == best(scores, 20)
        assert len(scores) > 40, "the rule had to choose"


def test_rows_with_a_negative_score_are_chosen_where_no_better_ones_are_left():
    model, inputs = double_model(), with_labels(padded())
    counts, (b, _, _) = independent_reads(model, inputs), brute_background(model, general_texts())
    optimizer = one_step(model, inputs, smf.read_background(model, general_texts()), rule="kl", rows_per_step=N_ROWS)
    for layer in LAYERS:
        assert min(kl_by_hand(counts[layer], b[layer]).values()) < 0
        assert optimizer.last_step.rows[layer].tolist() == sorted(counts[layer])


@pytest.mark.parametrize("rule", ["kl", "tfidf", "tf", "random", "all"])
def test_unread_rows_are_never_chosen(rule):
    model, inputs = double_model(), with_labels(padded([3, 2]))
    counts = independent_reads(model, inputs)
    background = smf.read_background(model, general_texts()) if rule in selection.NEED_BACKGROUND else None
    optimizer = one_step(model, inputs, background, rule=rule, rows_per_step=N_ROWS)
    for layer in LAYERS:
        assert len(counts[layer]) < N_ROWS
        assert optimizer.last_step.rows[layer].tolist() == sorted(counts[layer])
        assert optimizer.last_step.rows_read[layer] == len(counts[layer])


def test_rule_all_takes_every_row_read_whatever_rows_per_step_says():
    model, inputs = double_model(), with_labels(padded())
    counts = independent_reads(model, inputs)
    optimizer = one_step(model, inputs, rule="all", rows_per_step=1)
    assert {layer: rows.tolist() for layer, rows in optimizer.last_step.rows.items()} == {
        layer: sorted(counts[layer]) for layer in LAYERS
    }


def random_rows(*, seed: int = 0, steps: int = 2, update: str = "sgd", lr: float = 0.0) -> list[dict[int, list[int]]]:
    model = double_model()
    model.train()
    optimizer = smf.SparseMemoryOptimizer(model, lr=lr, rows_per_step=20, rule="random", seed=seed, update=update)
    rows = []
    for _ in range(steps):
        model(**with_labels(padded())).loss.backward()
        optimizer.step()
        rows.append({layer: ids.tolist() for layer, ids in optimizer.last_step.rows.items()})
    return rows


def test_random_depends_on_seed_step_and_layer_and_on_nothing_else():
    first = random_rows()
    torch.manual_seed(99)  # not on torch's own state
    assert random_rows(update="adam") == first
    assert random_rows(seed=1)[0][1] != first[0][1]
    assert first[0][1] != first[1][1], "the same reads at another step"


def test_the_generator_of_a_rule_depends_on_seed_step_and_layer():
    seeds = []
    for seed in (0, 0, 1):
        model = tiny_model()
        model.train()

        def rule(c_R, b_R, df_R, *, b_total, n_docs, generator):
            seeds.append(generator.initial_seed())
            return torch.rand(len(c_R), generator=generator)

        optimizer = smf.SparseMemoryOptimizer(model, lr=0.1, rule=rule, seed=seed)
        for step in range(2):
            model(**batch(seed=step)).loss.backward()
            optimizer.step()
    assert seeds[:4] == seeds[4:8]
    assert len(set(seeds)) == 8


def test_random_is_uniform_over_the_rows_read():
    scores = torch.stack([selection.random(C_R, B_R, DF_R, **(GIVEN | {"generator": seeded(i)})) for i in range(3000)])
    winners = torch.bincount(scores.argmax(1), minlength=3)
    assert winners.tolist() == pytest.approx([1000] * 3, abs=130)  # 5 standard deviations


# -- a user's own rule ------------------------------------------------------------------------------------------------


def test_an_own_rule_gets_reads_and_background_by_ascending_row_id():
    model, inputs = double_model(), with_labels(padded())
    b, df, n_docs = brute_background(model, general_texts())
    counts, calls = independent_reads(model, inputs), []

    def rule(c_R: Tensor, b_R: Tensor, df_R: Tensor, *, b_total: int, n_docs: int, generator: torch.Generator):
        calls.append((c_R.tolist(), b_R.tolist(), df_R.tolist(), b_total, n_docs))
        assert isinstance(generator, torch.Generator)
        return -torch.arange(len(c_R))  # the lowest ids, whole numbers

    optimizer = one_step(model, inputs, smf.read_background(model, general_texts()), rule=rule)
    for layer, call in zip(LAYERS, calls, strict=True):
        rows = sorted(counts[layer])
        of_each_row = [[count.get(row, 0) for row in rows] for count in (counts[layer], b[layer], df[layer])]
        assert call == (*of_each_row, sum(b[layer].values()) + N_ROWS, n_docs)
        assert optimizer.last_step.rows[layer].tolist() == rows[:20]


def test_an_own_rule_without_a_background_sees_no_general_reads():
    calls = []

    def rule(c_R, b_R, df_R, *, b_total, n_docs, generator):
        calls.append((float(b_R.sum()), float(df_R.sum()), b_total, n_docs))
        return c_R

    one_step(tiny_model(), batch(), rule=rule)
    assert calls == [(0, 0, N_ROWS, 0)] * 2


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        (lambda c_R: c_R[1:], "one score for each"),
        (lambda c_R: c_R[:, None], "one score for each"),
        (lambda c_R: c_R.tolist(), "list"),
        (lambda c_R: torch.where(c_R == c_R.max(), torch.nan, c_R), "NaN"),
    ],
)
def test_an_own_rule_that_returns_nonsense_is_refused_and_changes_nothing(returned, complaint):
    model = tiny_model()
    before = {layer: memory.values.clone() for layer, memory in smf.memory_layers(model).items()}
    with pytest.raises(smf.ConfigError, match=complaint):
        one_step(model, batch(), rule=lambda c_R, b_R, df_R, **_: returned(c_R))
    assert all(torch.equal(memory.values, before[layer]) for layer, memory in smf.memory_layers(model).items())


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(smf.ConfigError, match=r"'kll' is not known.*'kl', 'tfidf', 'tf', 'random', 'all'"):
        smf.SparseMemoryOptimizer(tiny_model(), lr=0.1, rule="kll")


# -- reads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hits", "gradient"])
@pytest.mark.parametrize("left", [False, True])
def test_counts_equal_an_independent_computation_and_pads_never_count(kind, left):
    model, inputs = double_model(init="paper"), with_labels(padded(left=left, extra=3))
    counts, seen = independent_reads(model, inputs, kind), []

    def rule(c_R, b_R, df_R, **_):
        seen.append(c_R)
        return c_R

    optimizer = one_step(model, inputs, rule=rule, reads=kind)
    for layer, c_R in zip(LAYERS, seen, strict=True):
        expected = [counts[layer][row] for row in sorted(counts[layer])]
        assert c_R.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)
        assert optimizer.last_step.reads[layer] == sum(LENGTHS) * READS_A_TOKEN


def test_all_tokens_count_whatever_their_label():
    inputs = with_labels(padded())
    inputs["labels"][:, :-1] = -100
    optimizer = one_step(tiny_model(), inputs, rule="tf")
    assert set(optimizer.last_step.reads.values()) == {sum(LENGTHS) * READS_A_TOKEN}


def test_without_a_mask_all_tokens_count():
    inputs = with_labels(padded())
    optimizer = one_step(tiny_model(), {k: v for k, v in inputs.items() if k != "attention_mask"}, rule="tf")
    assert set(optimizer.last_step.reads.values()) == {len(LENGTHS) * max(LENGTHS) * READS_A_TOKEN}


def test_a_boolean_mask_counts_like_one_of_numbers():
    inputs = with_labels(padded())
    optimizer = one_step(tiny_model(), inputs | {"attention_mask": inputs["attention_mask"].bool()}, rule="tf")
    assert set(optimizer.last_step.reads.values()) == {sum(LENGTHS) * READS_A_TOKEN}


def test_a_document_of_pads_alone_counts_nothing():
    inputs = with_labels(padded())
    inputs["attention_mask"][0] = 0
    optimizer = one_step(tiny_model(), inputs, rule="tf")
    assert set(optimizer.last_step.reads.values()) == {(sum(LENGTHS) - LENGTHS[0]) * READS_A_TOKEN}


# -- background -------------------------------------------------------------------------------------------------------


def same_counts(one: smf.Background, two: smf.Background) -> bool:
    columns = [
        torch.equal(getattr(one.layers[layer], name), getattr(two.layers[layer], name))
        for layer in LAYERS
        for name in ("ids", "b", "df")
    ]
    return all(columns) and (one.n_docs, one.identity, one.corpus) == (two.n_docs, two.identity, two.corpus)


def test_background_equals_counting_token_by_token():
    model = double_model()
    b, df, n_docs = brute_background(model, general_texts())
    background = smf.read_background(model, general_texts())
    assert background.n_docs == n_docs == 9
    for layer in LAYERS:
        counts = background.layers[layer]
        rows = counts.ids.tolist()
        assert rows == sorted(b[layer])
        assert dict(zip(rows, counts.b.tolist(), strict=True)) == b[layer]
        assert dict(zip(rows, counts.df.tolist(), strict=True)) == df[layer]
        assert counts.total == (sum(LENGTHS) + 15) * READS_A_TOKEN


def test_background_looks_up_any_rows():
    background = smf.read_background(double_model(), general_texts())
    counts = background.layers[1]
    unread = sorted(set(range(N_ROWS)) - set(counts.ids.tolist()))[:3]
    b_R, df_R = background.at(1, torch.tensor([*unread, int(counts.ids[5])]))
    assert b_R.tolist() == [0, 0, 0, counts.b[5]]
    assert df_R.tolist() == [0, 0, 0, counts.df[5]]


@pytest.mark.parametrize("other", [{"left": True}, {"left": True, "extra": 5}, {"extra": 4}])
def test_background_does_not_depend_on_padding(other):
    model = double_model()
    assert same_counts(smf.read_background(model, [padded()]), smf.read_background(model, [padded(**other)]))


def test_background_reads_left_padded_documents_at_their_own_positions():
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.5)).double()
    model = get_peft_model(base, tiny_config())
    right, left = padded(), padded(left=True, extra=5)
    wrong = left | {"position_ids": torch.arange(17).expand(6, 17)}
    assert same_counts(smf.read_background(model, [right]), smf.read_background(model, [left]))
    assert not same_counts(smf.read_background(model, [right]), smf.read_background(model, [wrong]))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_background_does_not_depend_on_the_batch_size(size):
    model, whole = double_model(), padded()
    parts = [{name: tensor[i : i + size] for name, tensor in whole.items()} for i in range(0, len(LENGTHS), size)]
    assert same_counts(smf.read_background(model, [whole]), smf.read_background(model, parts))


def test_background_of_a_batch_without_mask_counts_every_token():
    background = smf.read_background(tiny_model(), [{"input_ids": batch(3, 5)["input_ids"]}])
    assert {counts.total for counts in background.layers.values()} == {15 * READS_A_TOKEN}


def test_background_leaves_model_and_reads_as_they_were():
    model = tiny_model(init="paper")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smf.read_background(model, general_texts())
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(smf.TrainingError, match="no reads"):
        smf.SparseMemoryOptimizer(model, lr=0.1, rule="tf").step()


def test_background_file_brings_back_the_same_counts(tmp_path: Path):
    background = smf.read_background(double_model(), general_texts())
    background.save(tmp_path / "general.background")
    assert same_counts(smf.Background.load(tmp_path / "general.background"), background)
    assert [path.name for path in tmp_path.iterdir()] == ["general.background"], "no temporary file stays"


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_background_file_is_refused(tmp_path: Path, part: float):
    path = tmp_path / "general.background"
    smf.read_background(double_model(), general_texts()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(smf.BackgroundError, match="not a readable background"):
        smf.Background.load(path)


def test_files_that_are_no_background_are_refused(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(smf.BackgroundError, match="no background file at"):
        smf.Background.load(path)
    save_file({"1.b": torch.ones(3)}, path)
    with pytest.raises(smf.BackgroundError, match="not a background of smf"):
        smf.Background.load(path)
    path.write_text("general text")
    with pytest.raises(smf.BackgroundError, match="not a readable background"):
        smf.Background.load(path)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ([], "no document"),
        ([{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}], "no document"),
        (["a text"], "tokenizer"),
        ([{"labels": torch.ones(2, 3)}], "input_ids"),
        ([{"input_ids": [[1, 2, 3], [1, 2]]}], "rectangular"),
        ("one text", "list of texts"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "list of texts"),
        (None, "list of texts"),
        ([{"input_ids": torch.ones(3, dtype=torch.long)}], r"\[B, S\]"),
        ([{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2)}], "attention_mask"),
    ],
)
def test_background_refuses_data_without_documents(data, complaint):
    with pytest.raises(smf.BackgroundError, match=complaint):
        smf.read_background(tiny_model(), data)


def test_background_sees_through_wrappers():
    model = tiny_model()
    plain, wrapped = (smf.read_background(m, [batch()]) for m in (model, torch.compile(model)))
    assert plain.identity == wrapped.identity
    assert all(torch.equal(plain.layers[layer].b, wrapped.layers[layer].b) for layer in plain.layers)


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"max_length": 0}])
def test_background_refuses_sizes_that_read_nothing(sizes):
    with pytest.raises(smf.BackgroundError, match="at least 1"):
        smf.read_background(tiny_model(), [batch()], **sizes)


def test_background_needs_memory_that_reads():
    with pytest.raises(smf.BackgroundError, match="no memory layers"):
        smf.read_background(tiny_base(), general_texts())
    model = tiny_model()
    with pytest.raises(smf.BackgroundError, match="disabled"), model.disable_adapter():
        smf.read_background(model, general_texts())


def test_background_belongs_to_base_config_query_and_keys_but_not_to_values():
    model = tiny_model()
    own = smf.read_background(model, general_texts()).identity
    with torch.no_grad():
        smf.memory_layers(model)[1].values.add_(1)
    assert smf.read_background(model, general_texts()).identity == own
    other_keys = get_peft_model(tiny_base(), tiny_config(seed=1))
    others = [tiny_model(seed=1), other_keys, tiny_model(knn=3), tiny_model(layers=[1, 3])]
    with torch.no_grad():
        smf.memory_layers(model)[1].tensor("keys")[0, 0, 0, 0] += 1
    identities = [smf.read_background(other, general_texts()).identity for other in [*others, model]]
    assert len({own, *identities}) == 6


def test_a_rule_with_another_signature_is_refused_when_it_is_given():
    with pytest.raises(smf.ConfigError, match="must be callable as rule"):
        smf.SparseMemoryOptimizer(tiny_model(), lr=0.1, rule=lambda counts: counts)


def test_reading_a_background_leaves_every_module_in_its_mode():
    model = tiny_model()  # PEFT leaves its wrapper in training mode around a base in evaluation mode
    model.train()
    model.base_model.eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    smf.read_background(model, [batch()])
    assert [module.training for module in model.modules()] == before


def test_reports_are_short_enough_to_print():
    model = tiny_model()
    background = smf.read_background(model, [batch()])
    optimizer = smf.SparseMemoryOptimizer(model, background, lr=0.1, rows_per_step=8)
    model.train()
    model(**batch()).loss.backward()
    optimizer.step()
    assert repr(optimizer.last_step).startswith("StepReport(step=1, rows={1: 8, 2: 8}")
    assert len(repr(background)) < 200


def test_rows_of_an_earlier_training_are_spared_by_the_next(tmp_path: Path):
    model = tiny_model()
    texts = [batch(4, 12, seed) for seed in range(3)]
    background = smf.read_background(model, texts)
    train(model, steps=3, rows_per_step=8, lr=0.1)
    written = patch_of(model).rows
    spared = background.protecting(written)
    for layer, ids in written.items():
        b, df = spared.at(layer, ids)
        assert set(b.tolist()) == {float(background.layers[layer].b.max())} and set(df.tolist()) == {12.0}
        others = torch.tensor([i for i in range(256) if i not in set(ids.tolist())])
        assert all(
            torch.equal(x, y) for x, y in zip(spared.at(layer, others), background.at(layer, others), strict=True)
        )
    assert spared.corpus != background.corpus and spared.identity == background.identity

    def overlap(rule: str, known: smf.Background) -> int:
        again = tiny_model()
        train(again, steps=3, rows_per_step=8, lr=0.1, rule=rule, background=known)
        rows = patch_of(again).rows
        return sum(int(torch.isin(rows[layer], written[layer]).sum()) for layer in rows)

    for rule in ("kl", "tfidf", "tf", "random"):
        assert overlap(rule, spared) == 0 < overlap(rule, background), rule
    saved = tmp_path / "background.safetensors"
    spared.save(saved)
    assert overlap("kl", smf.Background.load(saved)) == 0
    with pytest.raises(smf.BackgroundError, match="must be ids from 0"):
        background.protecting({1: torch.tensor([-1])})
    lists = background.protecting({layer: ids.tolist() for layer, ids in written.items()})  # type: ignore[misc]
    assert lists.corpus == spared.corpus
    # with fewer other rows read than a step takes, spared ones are chosen too
    every = background.protecting({layer: torch.arange(256) for layer in written})
    assert overlap("kl", every) > 0
    with pytest.raises(smf.BackgroundError, match=r"rows of layers \[7\] cannot be protected"):
        background.protecting({7: torch.tensor([1])})
