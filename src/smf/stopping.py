"""SIGTERM: a training saves a checkpoint first; the process then ends with exit code 75, and its next start goes on."""

from __future__ import annotations

import signal
import threading
from typing import Any

from transformers import TrainerCallback

from .errors import Stopped
from .ranks import true_everywhere


def end_on_sigterm() -> None:
    """From now on SIGTERM ends this process through its `finally` clauses, with exit code 75."""
    signal.signal(signal.SIGTERM, _stop)


def _stop(*_: Any) -> None:
    raise Stopped("stopped by SIGTERM; the same command goes on where it was")


class StopAtSigterm(TrainerCallback):
    """While it is entered, SIGTERM waits for the end of the step: then Trainer saves a checkpoint and stops.

    Trainer's own `enable_jit_checkpoint` waits for three seconds, and may save in the midst of a step, after dropout
    has drawn its numbers: what goes on from there is another training.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def __enter__(self) -> StopAtSigterm:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        self.came = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All ranks stop after the same step, whichever of them was asked to."""
        (go_on,) = true_everywhere(not self.came)
        if not go_on:
            self.came = control.should_save = control.should_training_stop = True
