"""How long the whole demo takes, in runs of full finetuning.

    python benchmarks/demo.py

`smf demo` from nothing, then its row `full` alone with the base that it is compared with, each in a folder of its own.
Processor seconds are those of all their processes. Writes benchmarks/results/demo.json.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time

from turns import Result, parser


def seconds_of(*options: str) -> dict[str, float]:
    """Seconds of `smf demo` with these options."""
    with tempfile.TemporaryDirectory() as folder:
        clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "smf", "demo", "--output", folder, *options], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clock": time.perf_counter() - clock, "processor": processor}


def main() -> None:
    options = parser(__doc__, turns=1).parse_args()
    result = Result(__file__, options)
    whole = [seconds_of() for _ in range(options.turns)]
    full = [seconds_of("--methods", "full") for _ in range(options.turns)]
    ratios = {kind: [a[kind] / b[kind] for a, b in zip(whole, full, strict=True)] for kind in ("clock", "processor")}
    result.write(figures={"runs of full finetuning": ratios}, seconds={"whole demo": whole, "full alone": full})


if __name__ == "__main__":
    main()
