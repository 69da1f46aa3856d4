"""Steps whose loss or gradient is not finite: skipped, counted and noted, so that nothing they touch is spoilt."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from . import ranks
from .data import Example
from .errors import NotFiniteError, TrainingError, refusing
from .files import read_text, write_json
from .optimizer import SparseMemoryOptimizer

SKIPPED = "skipped.json"  # in a run's folder, where a step was skipped


class Skipping(TrainerCallback):
    """Skips steps of Trainer that are not finite, on all ranks alike; the schedule and the examples go on.

    Args:
        optimizer: that Trainer steps.
        examples: in the order of training, `batch_size` a step.
        batch_size: examples of a step.
        at_most: steps that may be skipped; one more ends the training.
        path: of the list of skipped steps.
        resumed_at: the step that a resumed training goes on from; 0: a fresh one.
        main: whether this process writes.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        examples: Sequence[Example],
        batch_size: int,
        at_most: int,
        path: Path,
        resumed_at: int,
        *,
        main: bool,
    ):
        self.optimizer, self.examples, self.batch_size = optimizer, examples, batch_size
        self.at_most, self.path, self.main = at_most, path, main
        self.steps: list[dict[str, Any]] = [each for each in _listed(path) if each["step"] <= resumed_at]
        if main and self.steps:
            write_json(path, self.steps)  # without what a killed process skipped later, which comes again
        elif main:
            path.unlink(missing_ok=True)
        self.max_grad_norm = 0.0
        self._losses: list[Tensor] = []  # of the step's micro-batches on this rank

    def watched(self, loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A loss function whose values are looked at."""

        def watched(*arguments: Any, **options: Any) -> Tensor:
            loss = loss_of(*arguments, **options)
            self._losses.append(loss.detach())
            return loss

        return watched

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Clip in Trainer's place, which does so before anyone looks: an infinite norm would leave zeros everywhere."""
        self.max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give Trainer's arguments back as they were."""
        args.max_grad_norm = self.max_grad_norm

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Between the last backward pass of a step and the optimizer, which is Accelerate's around ours."""
        gradients = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in gradients])
        loss_is, gradient_is = ranks.true_everywhere(_finite(self._losses), _finite([norm, *self._factors()]))
        self._losses = []
        if loss_is and gradient_is:
            if self.max_grad_norm:
                nn.utils.clip_grads_with_norm_(gradients, self.max_grad_norm, norm)
            if not isinstance(self.optimizer, SparseMemoryOptimizer):
                return
            try:  # the gradient of its rows is known within the step alone, which refuses it on all ranks alike
                optimizer.step()
            except NotFiniteError:
                gradient_is = False
        optimizer.gradient_state._set_sync_gradients(False)  # in the midst of accumulating, Accelerate does not step
        if loss_is and gradient_is:
            return
        self.optimizer.zero_grad()  # of a memory, what the backward passes left as well
        self.refuse_diverged(state.global_step)  # no batch is to blame, and every step would be skipped
        self._note(state.global_step, "gradient" if loss_is else "loss")

    def refuse_diverged(self, done: int) -> None:
        """Raise where a number that trains is not finite after `done` steps: the rate was too high for an update."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if isinstance(self.optimizer, SparseMemoryOptimizer):
            trained += [memory.values for memory in self.optimizer.memories.values()]
        if not _finite([tensor.detach() for tensor in trained]):
            raise TrainingError(
                f"what trains is not finite after step {done}: the training has diverged. Lower the learning rate"
            )

    def _factors(self) -> list[Tensor]:
        """What the rows' gradient is made of."""
        if not isinstance(self.optimizer, SparseMemoryOptimizer):
            return []
        pending = [factors for memory in self.optimizer.memories.values() for factors in memory.pending]
        return [tensor for factors in pending for tensor in (factors.w_TR, factors.g_TD)]

    def _note(self, done: int, what: str) -> None:
        """Write down step `done + 1`, and end the training where it is one too many."""
        batch = self.examples[done * self.batch_size : (done + 1) * self.batch_size]
        self.steps.append({"step": done + 1, "not_finite": what, "examples": [example.id for example in batch]})
        if self.main:
            write_json(self.path, self.steps)
            print(f"smf: step {done + 1} skipped: its {what} is not finite; its examples: {self.path}", file=sys.stderr)
        if len(self.steps) > self.at_most:
            raise TrainingError(
                f"the {what} of step {done + 1} is not finite, and {len(self.steps) - 1} steps were skipped before; at "
                f"most {self.at_most} may be (max_skipped in [train]). They changed nothing, and {self.path} has their "
                "examples: look at these, or lower the learning rate"
            )


def _listed(path: Path) -> list[dict[str, Any]]:
    with refusing(TrainingError, f"{path} is not what was written; remove {path.parent} to begin this run anew"):
        try:
            return [each | {"step": int(each["step"])} for each in json.loads(read_text(path))]
        except FileNotFoundError:  # none was skipped, or another rank has just seen that none counts
            return []


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    found = [tensor for tensor in tensors if tensor.numel()]
    return bool(nn.utils.get_total_norm(found, norm_type=float("inf")).isfinite())  # one look at the device for all
