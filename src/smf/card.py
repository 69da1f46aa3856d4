"""Sharing what a run learned: adapter and patch on the hub, with a model card that says what was gained and lost."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, DataError
from .recipe import Recipe
from .recipe_file import load_recipe, to_toml
from .runs import read_result
from .summary import summarise
from .table import markdown

TAGS = ["sparse-memory-finetuning", "peft"]
LOAD_ADAPTER = """```python
import smf  # registers the memory layers with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

{base}
model = PeftModel.from_pretrained(base, {repo!r})
```
"""
LOAD_PATCH = """The changed rows alone are in `patch.smf` ({size:.1f} MB), to put in and to take out again, bit for bit:

```python
from huggingface_hub import hf_hub_download
from peft import get_peft_model

patch = smf.load_patch(hf_hub_download({repo!r}, "patch.smf"))
model = get_peft_model(base, patch.config)
patch.apply(model)  # patch.revert(model) gives the base back
```
"""


def model_card(run: Path, repo: str) -> str:
    """The card of one finished run, as the README of a repository.

    Args:
        run: its folder; the result of the base, which scores are compared with, lies beside it.
        repo: name of the repository on the hub.

    Raises:
        ConfigError: where the folder is no finished run with an adapter.
        DataError: where its result is broken.
    """
    from huggingface_hub import ModelCardData

    recipe, result, bases = _read(run)
    method = result["method"]
    summary = summarise([*bases, result], recipe.target.metrics)
    known = recipe.base if not _is_local(recipe.base) and recipe.base != "world" else None
    data = ModelCardData(base_model=known, library_name="peft", tags=TAGS)
    base = without_folders(recipe).base
    versions = ", ".join(f"{name} {version}" for name, version in result["provenance"]["versions"].items())
    revision = result["provenance"].get("revisions", {}).get(recipe.base, recipe.revision)
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {repo.rpartition('/')[2]}\n",
        f"`{base}`, taught by [sparse memory finetuning](https://pypi.org/project/sparse-memory-finetuning/) "
        f"(`{method}`): {result['steps']:,} steps, {_changed(result)}. The base's own weights did not change.\n",
        "## What was gained and lost\n",
        markdown(summary),
        "## How to load it\n\n```sh\npip install sparse-memory-finetuning\n```\n",
        LOAD_ADAPTER.format(base=_load_base(recipe, revision), repo=repo),
    ]
    if (run / "patch.smf").is_file():
        parts.append(LOAD_PATCH.format(repo=repo, size=(run / "patch.smf").stat().st_size / 1e6))
    parts.append(f"## How it was made\n\n`recipe.toml` is the whole recipe: `smf train recipe.toml --method {method}`.")
    return "\n".join([*parts, f"With {versions}.\n"])


def _is_local(base: str) -> bool:
    return Path(base).exists() or Path(base).is_absolute()


def _load_base(recipe: Recipe, revision: str) -> str:
    """The line that loads the base where somebody else has it."""
    if recipe.base == "world":
        return (
            "from smf import world  # the base is shipped with the package\n\n"
            f'base = AutoModelForCausalLM.from_pretrained(world.BASE, dtype="{recipe.dtype}")'
        )
    if _is_local(recipe.base):
        return (
            "# the base is a folder of whoever trained this; it is not on the hub: put your copy of it here\n"
            f'base = AutoModelForCausalLM.from_pretrained("{without_folders(recipe).base}")'
        )
    return f"base = AutoModelForCausalLM.from_pretrained({recipe.base!r}, revision={revision!r})"


def without_folders(recipe: Recipe) -> Recipe:
    """The recipe with the names of this machine's folders in place of where they are."""
    names = {key: getattr(recipe, key) for key in ("base", "data", "output", "lm_eval_tasks")}
    local = {key: Path(name).resolve().name for key, name in names.items() if name and _is_local(name)}
    return replace(recipe, **local)


def _changed(result: dict[str, Any]) -> str:
    if result.get("rows_changed"):
        return f"{result['rows_changed']:,} rows of the memory changed"
    return f"{result.get('numbers_changed') or 0:,} numbers changed"


def _read(run: Path) -> tuple[Recipe, dict[str, Any], list[dict[str, Any]]]:
    """Recipe and result of a run, and the results of the base beside it, of which there is one or none."""
    if not (run / "result.json").is_file():
        raise ConfigError(f"{run} is not the folder of a finished run: there is no result.json in it")
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise ConfigError(f"{run} has no adapter: only runs of a memory (kinds smf and healed) can be shared like this")
    result, recipe = read_result(run / "result.json"), load_recipe(run / "recipe.toml")
    bases = []
    for path in sorted(run.parent.glob("*/result.json")):
        with contextlib.suppress(DataError):  # a broken one beside it is no reason to fail
            bases.append(read_result(path))
    ours = [base for base in bases if base["kind"] == "base" and base["comparison"] == result["comparison"]]
    return recipe, result, ours[:1]


def push_to_hub(run: str | Path, repo: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a run's adapter, patch, recipe and card; returns the address of the commit.

    Args:
        run: folder of a finished run.
        repo: name on the hub, "user/name"; made where there is none.
        private: whether a new repository is.
        token: of the hub; None: the one that `hf auth login` stored.
    """
    from huggingface_hub import HfApi

    run = Path(run)
    card = model_card(run, repo)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(run / "adapter", folder, dirs_exist_ok=True)
        recipe = load_recipe(run / "recipe.toml")
        if (run / "patch.smf").is_file():
            shutil.copy(run / "patch.smf", folder)
        (Path(folder) / "recipe.toml").write_text(to_toml(without_folders(recipe)), encoding="utf-8")
        if _is_local(recipe.base) or recipe.base == "world":
            _name_base(Path(folder) / "adapter_config.json", without_folders(recipe).base)
        if _is_local(recipe.base):
            print(
                f"smf: warning: the base is a folder of this machine ({recipe.base}): what is uploaded says its name "
                "alone, and nobody can load it without a copy of the base; upload it too",
                file=sys.stderr,
            )
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Adapter and patch of {run.name}")
        )


def _name_base(config: Path, name: str) -> None:
    """Write a name in place of the folder that an adapter's configuration says its base is in."""
    written = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": name}
    config.write_text(json.dumps(written, indent=2), encoding="utf-8")
