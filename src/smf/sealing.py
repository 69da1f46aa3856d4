"""Checkpoints of a Trainer of one's own: each gets a manifest, and training goes on from the newest that holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from .checkpoints import MANIFEST, flaw, found_in, seal, set_aside
from .errors import ConfigError, StorageError, refusing
from .ranks import is_main, world_size


class SealCheckpoints(TrainerCallback):
    """Seals what Trainer saves: the SHA-256 of every file, written last (`smf_complete.json`).

    `newest_checkpoint` then tells a checkpoint that is whole from one that a crash cut off or a disk damaged. Give it
    after callbacks that write into checkpoints themselves: a file that comes after the manifest breaks it.

    Raises:
        ConfigError: at the training's start, for options of Trainer by which a crash could leave no sealed checkpoint,
            or whose checkpoints it is not told of.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse what cannot be kept."""
        if args.save_total_limit == 1:
            raise ConfigError(
                "save_total_limit = 1: Trainer removes the last sealed checkpoint before the next one can be sealed, "
                "so a crash between the two would leave none; set it to 2 or more"
            )
        if getattr(args, "enable_jit_checkpoint", False):
            raise ConfigError("enable_jit_checkpoint = True saves without asking callbacks, so without a manifest")
        if state.is_hyper_param_search:
            raise ConfigError("a hyperparameter search of Trainer saves elsewhere: SealCheckpoints is for one training")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Once all ranks have written, the one that saves seals."""
        if world_size() > 1:
            dist.barrier()
        if args.should_save:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", step=state.global_step)


def newest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a Trainer's output folder whose manifest holds; None where there is none.

    For `trainer.train(resume_from_checkpoint=smf.newest_checkpoint("out"))`, with `SealCheckpoints` among the
    callbacks. Newer checkpoints that are not whole are renamed to "set-aside-STEP", where Trainer does not count them,
    and each is told on stderr with what is wrong with it; none is removed. So are sound ones that were saved without
    the callback, which no manifest vouches for; to go on from one of these, give its own path. Ranks find the same
    one, if the folder is one for all of them.

    Raises:
        StorageError: where one cannot be renamed.
    """
    found = found_in(Path(folder))
    for checkpoint in found:
        why = flaw(checkpoint)
        if why is None:
            return str(checkpoint)
        if not (checkpoint / MANIFEST).is_file():
            why = "it has no manifest: it was not written to its end, or saved without smf.SealCheckpoints"
        if is_main():
            with refusing(StorageError, f"{checkpoint} is not whole ({why}) and cannot be renamed"):
                kept = set_aside(checkpoint)
            print(f"smf: set aside {checkpoint}: {why}; kept as {kept.name}", file=sys.stderr)
    if found and is_main():
        print(f"smf: no checkpoint in {folder} is whole: training begins at its first step", file=sys.stderr)
    return None
