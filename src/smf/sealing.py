"""Checkpoints of a Trainer of one's own: each gets a manifest, and training goes on from the newest that holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from .checkpoints import flaw, found_in, seal, set_aside
from .ranks import world_size


class SealCheckpoints(TrainerCallback):
    """Seals what Trainer saves: the SHA-256 of every file, written last (`smf_complete.json`).

    `newest_checkpoint` then tells a checkpoint that is whole from one that a crash cut off or a disk damaged. Give it
    after callbacks that write into checkpoints themselves: a file that comes after the manifest breaks it.
    """

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
    and each is told on stderr with what is wrong with it; none is removed. Ranks find the same one, if the folder is
    one for all of them.
    """
    for checkpoint in found_in(Path(folder)):
        why = flaw(checkpoint)
        if why is None:
            return str(checkpoint)
        if os.environ.get("RANK", "0") == "0":
            print(f"smf: set aside {checkpoint}: {why}; kept as {set_aside(checkpoint).name}", file=sys.stderr)
    return None
