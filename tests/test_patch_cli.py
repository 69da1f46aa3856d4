"""`smf patch`: what a newcomer sees, does and undoes with a run's patch, from the command line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import smf
from conftest import batch, logits, tiny_base, tiny_model, train
from smf.patch_cli import _names, main
from smf.patch_file import patch_of
from smf.row_report import row_report


@pytest.fixture
def patches(tmp_path: Path) -> dict[str, smf.Patch]:
    """Two trainings apart, and one on top of the first; in files and adapters of these names."""
    found = {}
    for name, seed in (("a", 0), ("b", 50)):
        model = tiny_model()
        train(model, steps=3, seed=seed, lr=0.1)
        model.save_pretrained(tmp_path / name)
        found[name] = smf.save_patch(model, tmp_path / f"{name}.smf", corpus=name)
        if name == "a":
            train(model, steps=3, seed=90, lr=0.1)
            model.save_pretrained(tmp_path / "ac")
            found["c"] = smf.save_patch(model, tmp_path / "c.smf", corpus="c")
    return found


def model_of(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny_base(), folder).eval()


def test_apply_makes_an_adapter_and_revert_unmakes_it(patches: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    main(["apply", str(tmp_path / "a.smf"), "--output", str(tmp_path / "one")])
    assert torch.equal(logits(model_of(tmp_path / "one")), logits(model_of(tmp_path / "a")))
    main(["apply", str(tmp_path / "c.smf"), "--to", str(tmp_path / "one"), "--output", str(tmp_path / "two")])
    assert torch.equal(logits(model_of(tmp_path / "two")), logits(model_of(tmp_path / "ac")))
    with pytest.raises(smf.PatchError, match="not what the patch wrote"):
        main(["revert", str(tmp_path / "a.smf"), "--from", str(tmp_path / "two"), "--output", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()
    main(["revert", str(tmp_path / "c.smf"), "--from", str(tmp_path / "two"), "--output", str(tmp_path / "two")])
    main(["revert", str(tmp_path / "a.smf"), "--from", str(tmp_path / "two"), "--output", str(tmp_path / "zero")])
    assert torch.equal(logits(model_of(tmp_path / "zero")), logits(tiny_base()))
    rows = sum(map(len, patches["a"].rows.values()))
    assert f"applied {rows} rows" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["", "--to a", "--from a"])
def test_a_folder_that_holds_something_else_is_not_overwritten(
    patches: dict, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
):
    """Such as an adapter that was trained for days; the one that is changed may be written where it was."""
    monkeypatch.chdir(tmp_path)
    command = ["revert" if "from" in source else "apply", "c.smf" if "to" in source else "a.smf", *source.split()]
    before = {path.name: path.read_bytes() for path in Path("b").iterdir()}
    with pytest.raises(smf.PatchError, match="--output b holds files already"):
        main([*command, "--output", "b"])
    assert {path.name: path.read_bytes() for path in Path("b").iterdir()} == before
    Path("empty").mkdir()
    main([*command, "--output", "empty"])
    main([*command, "--output", "a" if source else "new"])


def test_merge_writes_a_patch_and_lists_rows_of_both(patches: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    both, files = str(tmp_path / "both.smf"), [str(tmp_path / "a.smf"), str(tmp_path / "b")]
    with pytest.raises(smf.PatchError, match="choose a policy for them"):
        main(["merge", *files, "--output", both])
    assert "Rows that two patches change" in capsys.readouterr().out and not Path(both).exists()
    main(["merge", *files, "--output", both, "--policy", "weighted", "--weights", "1", "3"])
    merged = smf.load_patch(both)
    expected = patches["a"].merge(patches["b"], policy="weighted", weights=[1, 3])
    assert all(torch.equal(merged.new[i], expected.new[i]) for i in expected.new)
    main(["merge", str(tmp_path / "a.smf"), str(tmp_path / "c.smf"), "--output", str(tmp_path / "ac.smf")])
    assert torch.equal(logits(smf.load(tiny_base(), tmp_path / "ac.smf")), logits(model_of(tmp_path / "ac")))
    with pytest.raises(smf.PatchError, match="give at least two patches"):
        main(["merge", files[0], "--output", both])


def test_diff_counts_rows(patches: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    main(["diff", str(tmp_path / "a.smf"), str(tmp_path / "b.smf")])
    shown = capsys.readouterr().out
    for layer, found in patches["a"].diff(patches["b"]).items():
        line = next(line for line in shown.splitlines() if line.startswith(f"│ {layer} "))
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:5] == [str(len(x)) for x in (found.only_first, found.only_second, found.equal, found.apart)]


def test_patches_of_one_files_name_are_told_apart_by_their_runs(
    patches: dict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    files = [tmp_path / "old" / name / "patch.smf" for name in "ab"]
    for file in files:
        file.parent.mkdir(parents=True)
        shutil.copy(tmp_path / f"{file.parent.name}.smf", file)
    one, other = map(str, files)
    main(["diff", one, other])
    shown = capsys.readouterr().out
    assert "only a/patch.smf" in shown and "only b/patch.smf" in shown
    main(["merge", one, other, "--output", str(tmp_path / "both.smf"), "--policy", "sum"])
    assert "a/patch.smf, b/patch.smf" in capsys.readouterr().out
    main(["inspect", one, "--beside", other])
    assert "shared with b/patch.smf" in " ".join(capsys.readouterr().out.split())
    assert _names([tmp_path / "x" / "a" / "p", tmp_path / "y" / "a" / "p"]) == ["x/a/p", "y/a/p"]
    assert _names([tmp_path / "a", tmp_path / "a"]) == ["a", "a"] and _names([Path("a"), Path("b")]) == ["a", "b"]


def test_inspect_shows_what_a_run_changed(patches: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "a.smf").rename(run / "patch.smf")
    background = smf.read_background(tiny_model(), [batch(4, 12, seed) for seed in range(3)])
    background.save(run / "background.safetensors")
    main(["inspect", str(run), "--beside", str(tmp_path / "b.smf")])
    shown = capsys.readouterr().out
    for words in ("layers [1, 2]", "256 rows of 32", "corpus", "a LoRA of rank 16", "shared with b.smf", "never read"):
        assert words in shown, words
    main(["inspect", str(run), "--beside", str(tmp_path / "b.smf"), "--format", "json"])
    told = json.loads(capsys.readouterr().out)
    assert told["metadata"] == {"corpus": "a"}
    a, b = patches["a"], patches["b"]
    for each in told["layers"]:
        mine, theirs = (set(patch.rows[each["layer"]].tolist()) for patch in (a, b))
        read = set(background.layers[each["layer"]].ids.tolist())
        hubs = set(background.hubs(each["layer"], 256).tolist())
        assert (each["changed"], each["shared"], each["room"]) == (
            len(mine),
            [len(mine & theirs)],
            256 - len(mine | theirs),
        )
        assert (each["hubs"], each["read"]) == (len(mine & hubs), len(mine & read))
        assert each["quiet_room"] == 256 - len(mine | theirs | read)


def test_a_report_without_a_background_says_nothing_of_hubs(patches: dict):
    assert all(each.hubs is None and each.quiet_room is None for each in row_report(patches["a"]))
    other = smf.read_background(tiny_model(layers=[1]), [batch(4, 12)])
    with pytest.raises(smf.ConfigError, match=r"the background is of layers \[1\], the patch of \[1, 2\]"):
        row_report(patches["a"], background=other)
    larger = smf.read_background(tiny_model(n_keys=64), [batch(4, 12)])
    with pytest.raises(smf.ConfigError, match="another base or another memory"):
        row_report(patches["a"], background=larger)


def test_a_background_of_another_base_or_memory_is_refused(patches: dict):
    """Its rows are numbered alike and read by other texts. Of a healed memory a patch cannot tell."""
    row_report(patches["a"], background=smf.read_background(tiny_model(), [batch(4, 12)]))
    for other in (tiny_model(seed=3), tiny_model(heads=1)):
        with pytest.raises(smf.ConfigError, match="another base or another memory"):
            row_report(patches["a"], background=smf.read_background(other, [batch(4, 12)]))
    healed = tiny_model()
    with torch.no_grad():
        for memory in smf.memory_layers(healed).values():
            memory.tensor("query_weight").normal_()
    optimizer = smf.SparseMemoryOptimizer(healed, rule="tf", lr=0.1)
    healed.train()(**batch(4, 12)).loss.backward()
    optimizer.step()
    row_report(patch_of(healed), background=smf.read_background(tiny_model(), [batch(4, 12)]))


def test_an_output_that_cannot_be_written_is_one_message(patches: dict, tmp_path: Path):
    (tmp_path / "there").write_text("a file")
    with pytest.raises(smf.PatchError, match=r"cannot be read or written: .*there"):
        main(["apply", str(tmp_path / "a.smf"), "--output", str(tmp_path / "there")])
    assert (tmp_path / "there").read_text() == "a file"


def test_the_command_reaches_them_and_errors_are_one_line(
    patches: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from smf import cli

    monkeypatch.setattr("sys.argv", ["smf", "patch", "diff", str(tmp_path / "a.smf"), str(tmp_path / "c.smf")])
    cli.main()
    assert "both, apart" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["smf", "patch", "inspect", str(tmp_path / "nothing.smf")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("smf: error: no patch file at")
    monkeypatch.setattr("sys.argv", ["smf", "patch", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("inspect", "apply", "revert", "merge", "diff", "forget"))


def test_the_commands_and_the_example_of_the_page_run(
    patches: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    page = (Path(__file__).parents[1] / "docs" / "patches.md").read_text()
    commands, _ = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, other in (("medicine", "a"), ("law", "b")):
        (tmp_path / f"{other}.smf").rename(tmp_path / f"{name}.smf")
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(tmp_path / f"{name}.smf", tmp_path / "runs" / name / "patch.smf")
    for line in commands.strip().splitlines():
        program, group, *arguments = shlex.split(line, comments=True)
        assert (program, group) == ("smf", "patch")
        main(arguments)
    assert torch.equal(logits(model_of(tmp_path / "base_again")), logits(tiny_base()))
    model = tiny_model()
    train(model, steps=3, seed=0, lr=0.1)
    example, protecting, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"smf": smf, "model": model, "base": tiny_base()}
    exec(example, names)
    assert torch.equal(logits(smf.load(tiny_base(), "both.smf")), logits(smf.load(tiny_base(), names["both"])))
    assert ".protecting(patch.rows)" in protecting
