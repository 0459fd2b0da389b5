"""Results on disk: JSON with everything, CSV with the rows, Markdown to read."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import at_fused

Row = dict[str, Any]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Whatever a time depends on and a reader cannot know."""
    machine: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "at_fused": at_fused.__version__,
        "backends": list(at_fused.available_backends()),
        "commit": _commit(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def markdown(
    title: str, machine: dict[str, Any], headers: Sequence[str], lines: Sequence[Sequence[str]]
) -> str:
    """A page with one table and the machine it was measured on."""
    rows = [headers, ["---"] * len(headers), *lines]
    where = ", ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in machine.items()
    )
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"# {title}\n\n{body}\n\nMeasured on: {where}.\n"


def write(folder: Path, stem: str, page: str, rows: Sequence[Row], everything: dict[str, Any]) -> None:
    """Leaves stem.md, stem.csv and stem.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text(page)
    (folder / f"{stem}.json").write_text(json.dumps(everything | {"rows": list(rows)}, indent=2) + "\n")
    with (folder / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
