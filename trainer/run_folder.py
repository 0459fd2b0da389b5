"""The files of a run's folder, by name."""

from __future__ import annotations

import os
from pathlib import Path

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
MODEL = "model.pt"
CURVES = "curves.png"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"

ARTEFACTS = (CONFIG, CHECKPOINT, PREVIOUS, METRICS, SUMMARY, MODEL, CURVES)
RESULTS = (METRICS, SUMMARY, MODEL)  # written after the first checkpoint


def state_of(folder: Path | None) -> list[tuple[int, int] | None]:
    """Inode and time of modification of each artefact; equal as long as none has been written."""
    found: list[tuple[int, int] | None] = []
    for name in ARTEFACTS:
        try:
            status = os.stat(f"{folder}/{name}")
            found.append((status.st_ino, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found
