"""The optimizer in the loops people use: HF Trainer, TRL, a plain loop and accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import smf
from conftest import batch, logits, tiny_base, tiny_model, trainer_arguments

WORDS = [f"w{i}" for i in range(90)]


def memory_state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "sparse_memory_" in n}


def identical(a: Any, b: Any) -> bool:
    """Equal to the last bit, through dicts and lists of tensors and plain values."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def examples(count: int = 24, length: int = 12) -> list[dict[str, Tensor]]:
    rows = batch(count, length, seed=5)
    return [{k: v[i] for k, v in rows.items()} for i in range(count)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    return trainer_arguments(folder, **(options | changes))


def gather(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


# -- HF Trainer -------------------------------------------------------------------------------------------------------


def test_the_trainer_example_does_what_a_plain_loop_does(tmp_path: Path):
    model = tiny_model().double()
    background = smf.read_background(model, [batch(8, 16, seed=99)])
    optimizer = smf.SparseMemoryOptimizer(model, background, rows_per_step=8, rule="kl", reads="gradient", lr=1e-2)
    seen: list[dict[str, Tensor]] = []

    def collator(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        seen.append(gather(rows))
        return gather(rows)

    args = arguments(tmp_path, lr_scheduler_type="constant")
    trainer = Trainer(model, args, train_dataset=examples(), data_collator=collator, optimizers=(optimizer, None))
    trainer.train()
    assert optimizer.steps == trainer.state.global_step == len(seen) / 2 == 6

    plain = tiny_model().double()
    other = smf.SparseMemoryOptimizer(plain, background, rows_per_step=8, rule="kl", reads="gradient", lr=1e-2)
    plain.train()
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        for inputs in (first, second):
            (plain(**inputs).loss / 2).backward()
        other.step()
        other.zero_grad()
    assert identical(optimizer.last_step.rows, other.last_step.rows)
    for layer, memory in smf.memory_layers(plain).items():
        torch.testing.assert_close(smf.memory_layers(model)[layer].values, memory.values, atol=1e-9, rtol=1e-9)
        assert memory.values.any(-1).sum() <= 6 * 8


def test_the_schedule_of_the_trainer_moves_the_rows_rate(tmp_path: Path):
    model = tiny_model(train="rows+scale")
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, lr_other=1e-3, rule="tf")
    args = arguments(tmp_path, lr_scheduler_type="linear", max_steps=4)
    trainer = Trainer(model, args, train_dataset=examples(), optimizers=(optimizer, None))
    trainer.train()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert trainer.lr_scheduler.base_lrs == [1e-2, 1e-3]


def test_evaluation_during_training_reads_nothing(tmp_path: Path):
    def train(**changes: Any) -> tuple[PeftModel, smf.SparseMemoryOptimizer]:
        model = tiny_model()
        optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8)
        args = arguments(tmp_path, max_steps=4, **changes)
        data = {"train_dataset": examples(), "eval_dataset": examples(8)}
        Trainer(model, args, **data, optimizers=(optimizer, None)).train()
        return model, optimizer

    (plain, one), (evaluated, two) = train(), train(eval_strategy="steps", eval_steps=1)
    assert identical(memory_state(plain), memory_state(evaluated))
    assert one.last_step.reads == two.last_step.reads == {1: 2 * 4 * 12 * 8, 2: 2 * 4 * 12 * 8}


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "random"},
        {"rule": "tf", "reads": "gradient", "update": "sgd", "train": "rows+scale"},
        {"rule": "tf", "update": "masked-adam", "weight_decay": 0.1},
        {"rule": "all", "train": "memory", "init": "paper"},
        {"rule": "tf", "table_dtype": "bfloat16", "checkpointing": True},
    ],
    ids=["random", "sgd+scale", "masked-adam", "healing", "bfloat16+checkpointing"],
)
def test_resuming_from_a_checkpoint_is_bit_identical(options: dict[str, Any], tmp_path: Path):
    config = {k: v for k, v in options.items() if k in ("train", "init", "table_dtype")}
    rest = {k: v for k, v in options.items() if k not in (*config, "checkpointing")}
    extra = {"gradient_checkpointing": bool(options.get("checkpointing")), "save_strategy": "steps", "save_steps": 3}

    def trainer(folder: str) -> tuple[Trainer, smf.SparseMemoryOptimizer]:
        model = tiny_model(**config)
        optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rows_per_step=8, **rest)
        args = arguments(tmp_path / folder, max_steps=6, lr_scheduler_type="cosine", warmup_steps=2, **extra)
        return Trainer(model, args, train_dataset=examples(), optimizers=(optimizer, None)), optimizer

    whole, first = trainer("whole")
    whole.train()
    resumed, second = trainer("resumed")
    with torch.no_grad():
        for memory in smf.memory_layers(resumed.model).values():
            memory.values.normal_()  # nothing of the fresh model may survive
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert second.steps == first.steps == 6
    assert identical(memory_state(resumed.model), memory_state(whole.model))
    assert identical(second.state_dict(), first.state_dict())
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    assert identical(second.last_step.rows, first.last_step.rows)
    smf.save_patch(whole.model, tmp_path / "whole.smf")
    smf.save_patch(resumed.model, tmp_path / "resumed.smf")  # relative to the start of the training, not of the resume
    assert (tmp_path / "whole.smf").read_bytes() == (tmp_path / "resumed.smf").read_bytes()


def test_a_script_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture):
    def trained(folder: Path) -> Trainer:
        optimizer = smf.SparseMemoryOptimizer(model := tiny_model(), lr=1e-2, rule="tf", rows_per_step=8)
        args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=2)
        sealing = [smf.SealCheckpoints()]
        trainer = Trainer(model, args, train_dataset=examples(), optimizers=(optimizer, None), callbacks=sealing)
        trainer.train(resume_from_checkpoint=smf.newest_checkpoint(folder))
        return trainer

    whole, damaged, unsealed = trained(tmp_path), tmp_path / "checkpoint-6", tmp_path / "checkpoint-4"
    assert smf.newest_checkpoint(tmp_path) == str(damaged) and capsys.readouterr().err == ""
    content = bytearray((damaged / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "optimizer.pt").write_bytes(content)
    (unsealed / "smf_complete.json").unlink()  # as a crash leaves it, or who trained without our callback
    assert smf.newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert capsys.readouterr().err.splitlines() == [
        f"smf: set aside {damaged}: optimizer.pt is not what was written; kept as set-aside-6",
        f"smf: set aside {unsealed}: it has no manifest: it was not written to its end, or saved without "
        "smf.SealCheckpoints; kept as set-aside-4",
    ]
    assert (tmp_path / "set-aside-6" / "optimizer.pt").read_bytes() == content
    again = trained(tmp_path)
    assert again.state.global_step == 6 and identical(memory_state(again.model), memory_state(whole.model))
    (damaged / "trainer_state.json").unlink()
    assert smf.newest_checkpoint(tmp_path) == str(unsealed)
    assert (tmp_path / "set-aside-6-2").is_dir() and (tmp_path / "set-aside-6").is_dir()
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert smf.newest_checkpoint(tmp_path) is None and "begins at its first step" in capsys.readouterr().err


def test_what_the_page_says_of_checkpoints_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[1] / "docs" / "patches.md").read_text().partition("## Trainer's checkpoints")[2]
    example = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    for steps in (2, 4):
        optimizer = smf.SparseMemoryOptimizer(model := tiny_model(), lr=1e-2, rule="tf")
        args = arguments(Path("out"), max_steps=steps, save_strategy="steps", save_steps=2)
        names = {"Trainer": Trainer, "smf": smf, "args": args, "model": model, "optimizer": optimizer}
        exec(example, names | {"data": examples()})
        assert optimizer.steps == steps and smf.newest_checkpoint("out") == f"out/checkpoint-{steps}"


def test_what_seals_no_checkpoint_for_sure_is_refused_before_it_trains(tmp_path: Path):
    for options, message in (
        ({"save_total_limit": 1}, "set it to 2 or more"),
        ({"enable_jit_checkpoint": True}, "without asking callbacks"),
    ):
        optimizer = smf.SparseMemoryOptimizer(model := tiny_model(), lr=1e-2, rule="tf")
        args = arguments(tmp_path, **options)
        sealing = [smf.SealCheckpoints()]
        trainer = Trainer(model, args, train_dataset=examples(), optimizers=(optimizer, None), callbacks=sealing)
        with pytest.raises(smf.ConfigError, match=message):
            trainer.train()
        assert optimizer.steps == 0


def test_a_checkpoint_that_cannot_be_renamed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a disk that is mounted to be read only."""
    (tmp_path / "checkpoint-4").mkdir()

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(smf.StorageError, match=r"checkpoint-4 is not whole .* cannot be renamed: .*Read-only"):
        smf.newest_checkpoint(tmp_path)


def test_there_is_no_checkpoint_to_go_on_from(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    assert smf.newest_checkpoint(tmp_path) is smf.newest_checkpoint(tmp_path / "nowhere") is None


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path):
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=64)
    args = arguments(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    data = {"train_dataset": examples(), "eval_dataset": examples(8)}
    trainer = Trainer(model, args, **data, optimizers=(optimizer, None))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny_base(), best)))


def test_a_forgotten_optimizer_raises_instead_of_training_nothing(tmp_path: Path):
    trainer = Trainer(tiny_model(), arguments(tmp_path), train_dataset=examples())
    with pytest.raises(smf.TrainingError, match=r"no SparseMemoryOptimizer.*optimizers=\(smf"):
        trainer.train()


# -- TRL --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def conversations(count: int = 16) -> Dataset:
    def words(start: int, number: int) -> str:
        return " ".join(WORDS[(start + 7 * i) % 90] for i in range(number))

    return Dataset.from_list(
        [{"prompt": words(i, 3 + i % 4), "completion": " " + words(i + 40, 2 + i % 5)} for i in range(count)]
    )


@pytest.mark.parametrize(
    "options",
    [{"bf16": False}, {}, {"bf16": False, "completion_only_loss": False, "gradient_checkpointing": False}],
    ids=["float32", "defaults", "whole-text"],
)
def test_sft_trainer_teaches_completions(options: dict, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    model = tiny_model()
    before = memory_state(model)
    optimizer = smf.SparseMemoryOptimizer(model, lr=5e-2, rule="tf", reads="gradient", rows_per_step=16)
    reports: list[smf.StepReport] = []
    optimizer.register_step_post_hook(lambda *_: reports.append(optimizer.last_step))
    args = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        max_length=32,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataset_num_proc=None,
        **options,
    )
    trainer = SFTTrainer(
        model, args, train_dataset=conversations(), processing_class=tokenizer, optimizers=(optimizer, None)
    )
    trainer.train()
    assert optimizer.steps == 6
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    after = memory_state(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {n for n in after if "_values" in n}
    assert all(after[name].any(-1).sum() <= 6 * 16 for name in moved)
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    for layer in (1, 2):  # 6 steps of 8 examples are 3 epochs; a token reads 8 rows of a layer; pads none
        assert sum(report.reads[layer] for report in reports) == 3 * 8 * tokens


# -- a plain loop and accelerate --------------------------------------------------------------------------------------


def test_a_plain_loop_learns_a_batch():
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=5e-2, rule="tf", reads="gradient", rows_per_step=64)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model.train()
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.25
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_closure_is_called_once_and_its_loss_returned():
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf")
    model.train()
    calls = []

    def closure() -> Tensor:
        loss = model(**batch()).loss
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1


def test_accelerate_accumulates_like_a_plain_loop():
    def loop(accelerate: bool) -> tuple[dict[str, Tensor], smf.SparseMemoryOptimizer]:
        model = tiny_model(train="rows+scale")
        optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8)
        model.train()
        data = DataLoader(examples(16), batch_size=4)
        if not accelerate:
            for i, inputs in enumerate(data):
                (model(**inputs).loss / 2).backward()
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            return memory_state(model), optimizer
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        wrapped, prepared, data = accelerator.prepare(model, optimizer, data)
        for inputs in data:
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**inputs).loss)
                prepared.step()
                prepared.zero_grad()
        return memory_state(model), optimizer

    (plain, one), (accelerated, two) = loop(False), loop(True)
    assert one.steps == two.steps == 2
    assert one.last_step.reads == two.last_step.reads == {1: 8 * 8 * 12, 2: 8 * 8 * 12}
    assert identical(plain, accelerated)
