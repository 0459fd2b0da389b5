"""The files of a run's folder, by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
MODEL = "model.pt"
EMA_MODEL = "model-ema.pt"  # the moving average of the student
CURVES = "curves.png"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"

ARTEFACTS = (CONFIG, CHECKPOINT, PREVIOUS, METRICS, SUMMARY, MODEL, EMA_MODEL, CURVES)
RESULTS = (METRICS, SUMMARY, MODEL, EMA_MODEL)  # written after the first checkpoint


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


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that the run in `folder` has written.

    Raises:
        FileNotFoundError: there is none yet.
        ConfigError: it is no run's.
    """
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / CONFIG} is not a run's")
    return config


def read_summary(folder: Path) -> dict[str, Any]:
    """The results of the run in `folder`; FileNotFoundError until it is finished."""
    return dict(json.loads((folder / SUMMARY).read_text(encoding="utf-8")))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each epoch so far of the run in `folder`."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [json.loads(line) for line in lines]
