"""Results on disk: JSON with everything, CSV with the rows, Markdown to read."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import at_fused

Row = dict[str, Any]


class Table(NamedTuple):
    heading: str
    headers: Sequence[str]
    lines: Sequence[Sequence[str]]


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
        machine["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        machine["cuda"] = torch.version.cuda
        machine["triton"] = _version("triton")
    return machine


def markdown(title: str, machine: dict[str, Any] | None, tables: Sequence[Table]) -> str:
    """A page of tables, headed where there are several, and the machine they were measured on, if any."""
    parts = [f"# {title}"]
    for table in tables:
        parts += [f"## {table.heading}"] if len(tables) > 1 else []
        rows = [table.headers, ["---"] * len(table.headers), *table.lines]
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    if machine:
        where = ", ".join(
            f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in machine.items()
        )
        parts.append(f"Measured on: {where}.")
    return "\n\n".join(parts) + "\n"


def write(folder: Path, stem: str, page: str, rows: Sequence[Row], everything: dict[str, Any]) -> None:
    """Leaves stem.md, stem.csv and stem.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_page(folder / f"{stem}.md", page)
    write_page(folder / f"{stem}.json", json.dumps(everything | {"rows": list(rows)}, indent=2) + "\n")
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_page(folder / f"{stem}.csv", text.getvalue())


def write_page(path: Path, text: str) -> None:
    """Replaces the file in one step: whoever is killed leaves the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)


def read(folder: Path, stem: str) -> dict[str, Any]:
    """What `write` left in stem.json; empty where there is no such file."""
    try:
        content: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """Of the checkout; a copy without a history is told by the environment variable COMMIT."""
    return os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty")


def _output(*command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (result.stdout.splitlines() or ["unknown"])[0].strip()
