"""Results on disk: JSON with everything, CSV with the rows, Markdown to read."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import at_fused
from at_fused._files import write_atomically

Row = dict[str, Any]


class Table(NamedTuple):
    heading: str
    headers: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Result:
    """How the rows of a suite are read: a page of tables, a picture, and further keys of the JSON."""

    title: str
    tables: Sequence[Table]
    draw: Callable[[Path, dict[str, Any]], None] | None = None  # the picture, to a path, with the machine
    keys: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, stem: str, rows: Sequence[Row], machine: dict[str, Any]) -> str:
        """Write stem.md, stem.csv and stem.json into `folder`; returns the page."""
        page = markdown(self.title, machine, self.tables)
        write(folder, stem, page, rows, {"machine": machine} | self.keys)
        return page


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on and a reader cannot know."""
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
    """A page of tables, with headings where there are several, and the machine that they were measured on."""
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


def write(folder: Path, stem: str, page: str, rows: Sequence[Row], keys: dict[str, Any]) -> None:
    """Write stem.md, stem.csv and stem.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        files = {"md": page, "json": as_json(keys | {"rows": list(rows)}) + "\n", "csv": text.getvalue()}
    for suffix, content in files.items():
        write_atomically(folder / f"{stem}.{suffix}", content.encode())


def as_json(value: Any, indent: str = "") -> str:
    """`value` as JSON with each object of a list on one line, unless it holds such lists itself."""
    if not _holds_objects(value):
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {as_json(item, inner)}" for key, item in value.items()]
    else:
        parts = [as_json(item, inner) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"


def _holds_objects(value: Any) -> bool:
    """Whether there is a list of objects in `value`."""
    if isinstance(value, list):
        return any(isinstance(item, dict) or _holds_objects(item) for item in value)
    return isinstance(value, dict) and any(map(_holds_objects, value.values()))


def read(folder: Path, stem: str) -> dict[str, Any]:
    """What `write` has put into stem.json; empty where there is no such file."""
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
    """The commit of the checkout; in a copy without a history, the environment variable COMMIT."""
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
