"""The command `smf` as one of several ranks, which gets signals on its way: `torchrun rank_script.py WHEN train ...`.

WHEN is a list such as "0 1 step 3 KILL": in the first start (0) of the job rank 1 gets SIGKILL in the third call of
what PLACES calls "step"; several are separated by commas.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from smf import cli, loop, train
from smf.loss import MeanTokenLoss

PLACES: dict[str, tuple[Any, str]] = {
    "step": (MeanTokenLoss, "__call__"),
    "save": (loop, "seal"),
    "score": (train, "_score"),
    "finish": (train, "_saved"),
}


def disturb(place: str, call: int, sign: str) -> None:
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), []

    def disturbed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), getattr(signal, f"SIG{sign}"))
        return real(*arguments, **options)

    setattr(owner, name, disturbed)


def main() -> None:
    when = sys.argv.pop(1)
    for start, rank, place, call, sign in (each.split() for each in when.split(",") if each):
        if (start, rank) == (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]):
            disturb(place, int(call), sign)
    cli.main()


if __name__ == "__main__":
    main()
