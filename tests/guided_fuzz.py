"""The inputs of test_fuzz.py guided by coverage: `python tests/guided_fuzz.py KIND [options of libFuzzer]`.

    python tests/guided_fuzz.py patches -max_total_time=600

atheris (the extra `fuzz`) sees which of our code an input reaches, and changes those that reach more; hypothesis makes
of its bytes the same changed files as in the tests. It ends at the first input that is neither read nor refused, which
lies in `crash-...` then. The tests do without: a campaign has no end of its own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

with atheris.instrument_imports(include=["smf"]):
    from test_fuzz import KINDS, SECONDS


def main() -> None:
    attempt = KINDS[sys.argv.pop(1)](Path(tempfile.mkdtemp()))

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def everything(data: st.DataObject) -> None:
        attempt(data)

    atheris.Setup([*sys.argv, f"-timeout={SECONDS}"], everything.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
