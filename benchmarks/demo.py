"""How long the whole demo takes, in runs of full finetuning.

    python benchmarks/demo.py

`smf demo` from nothing, then its row `full` alone with the base that it is compared with, each in a folder of its own.
By the clock, since the processor's seconds of jobs are not those of a child of this process: run it on idle cores.
Writes benchmarks/results/demo.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

from turns import Result, parser


def seconds_of(*options: str) -> float:
    """Seconds of `smf demo` with these options."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "smf", "demo", "--output", folder, *options], check=True)
        return time.perf_counter() - begun


def main() -> None:
    options = parser(__doc__, turns=1).parse_args()
    result = Result(__file__, options)
    turns = [(seconds_of(), seconds_of("--methods", "full")) for _ in range(options.turns)]
    ratios = [whole / full for whole, full in turns]
    seconds = {"whole demo": [whole for whole, _ in turns], "full alone": [full for _, full in turns]}
    result.write(figures={"runs of full finetuning": ratios}, seconds=seconds)


if __name__ == "__main__":
    main()
