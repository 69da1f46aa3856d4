"""What `smf doctor` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .table import one_line, print_plain

if TYPE_CHECKING:
    from .health import Finding, Health


def examine(folders: Sequence[Path], as_json: bool) -> bool:
    """Print how the environment and some folders of runs are; returns whether nothing needs to be done."""
    from .doctor import environment
    from .health import look_at

    about, findings = environment()
    runs = [health for folder in folders for health in look_at(folder)]
    findings += [finding for health in runs for finding in health.findings]
    well = not any(finding.act for finding in findings)
    if as_json:
        found: dict[str, Any] = {"well": well, "environment": about, "runs": [asdict(run) for run in runs]}
        print(json.dumps(found | {"findings": [asdict(finding) for finding in findings]}, indent=2))
        return well
    print_plain("The environment", ["", ""], [list(item) for item in about.items()])
    if folders:
        print_plain("The runs", ["run", "state", "goes on from step", "damaged", "skipped", "MiB"], _rows(runs))
    _print_findings("To do", [finding for finding in findings if finding.act])
    _print_findings("Worth knowing", [finding for finding in findings if not finding.act])
    if well:
        print("Nothing needs to be done.")
    return well


def _rows(runs: Sequence[Health]) -> list[list[str]]:
    rows = []
    for run in runs:
        newest = "" if run.newest is None else f"{run.newest:,}"
        size = f"{run.bytes / 2**20:,.1f}"
        rows.append([run.folder, run.state, newest, ", ".join(run.damaged), str(run.skipped or ""), size])
    total = sum(run.bytes for run in runs)
    return rows if len(rows) < 2 else [*rows, ["together", "", "", "", "", f"{total / 2**20:,.1f}"]]


def _print_findings(title: str, findings: Sequence[Finding]) -> None:
    """One under the other and not in a table, so that commands can be copied."""
    if findings:
        print(f"{title}:")
    for finding in findings:
        print(f"  {one_line(finding.where)}: {one_line(finding.what)}\n      {one_line(finding.do)}")
