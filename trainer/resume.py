"""Where a run starts: whose run its output folder holds, and which checkpoint it continues from."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trainer import checkpoint, run_folder
from trainer.config import Config, flag_text
from trainer.errors import ConfigError, checkpoint_of
from trainer.lock import LOCK

OTHER_FOLDER = "choose another output-dir"

# Keys that may change between a run and its continuation: they do not alter what is learned.
FREE_KEYS = (
    "data-dir",
    "output-dir",
    "resume",
    "max-steps",
    "checkpoint-every",
    "workers",
    "threads",
    "max-unreadable",
    "cuda-graphs",
)


class Start(NamedTuple):
    """The output folder; a checkpoint to continue from, what it holds, what the user should know of it."""

    folder: Path
    path: Path | None = None
    checkpoint: dict[str, Any] | None = None
    notice: str | None = None


def find_start(config: Config) -> Start:
    """Where the run of `config` starts, by its `output-dir` and `resume`; nothing is touched.

    Raises:
        ConfigError: the folder holds another run, or the checkpoint is none of this run's.
    """
    if config.output_dir is None:
        raise ConfigError("output-dir is required, such as runs/first")
    folder = config.output_dir
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output-dir {folder} is not a folder")
    except OSError as error:
        raise ConfigError(f"output-dir {folder}: {error.strerror}") from None
    used = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if config.resume == "never" and used:
        raise ConfigError(f"output-dir {folder} is not empty, and resume is never")
    held = [name for name in run_folder.ARTEFACTS if (folder / name).exists()]
    if held:
        _check_same_run(
            _stored_config(folder), config, f"output-dir {folder}", ["teacher-checkpoint"], OTHER_FOLDER
        )
    source, notices = folder, []
    if config.resume not in ("auto", "never"):
        path = Path(config.resume)
        source = path if path.is_dir() else path.parent
        begun = (folder / run_folder.CHECKPOINT).exists() or (folder / run_folder.PREVIOUS).exists()
        if begun and not (source.exists() and source.samefile(folder)):
            if _stored_config(folder).get("resume") != config.resume:
                raise ConfigError(
                    f"output-dir {folder} holds a run, which resume {config.resume} would overwrite"
                )
            notices.append(
                f"output-dir {folder} already continues {config.resume}: resuming from its own checkpoint"
            )
            source = folder  # the same command, given again
        elif not path.is_dir():
            with checkpoint_of("resume"):
                return Start(folder, path, _resumable(checkpoint.load(path), path, config))
    found = checkpoint.load_latest(source)
    if found is None:  # empty, or killed before its first checkpoint
        if source is not folder:
            raise ConfigError(f"resume {config.resume}: the folder holds no checkpoint")
        if results := [name for name in run_folder.RESULTS if name in held]:
            raise ConfigError(
                f"output-dir {folder} holds results ({', '.join(results)}), and no checkpoint to continue "
                f"from; {OTHER_FOLDER}"
            )
        return Start(folder)
    stored, path, fault = found
    if fault:
        notices.append(f"{fault}; continuing from the checkpoint before it")
    return Start(folder, path, _resumable(stored, path, config), "; ".join(notices) or None)


def _resumable(stored: dict[str, Any], path: Path, config: Config) -> dict[str, Any]:
    if not isinstance(stored.get("config"), dict):
        raise ConfigError(f"checkpoint {path} cannot be resumed from: it is not a run's checkpoint.pt")
    if (found := stored.get("format", 1)) != checkpoint.FORMAT:
        raise ConfigError(
            f"checkpoint {path} cannot be resumed from: it has format {found}, which another version of "
            f"train.py has written; this one reads format {checkpoint.FORMAT}"
        )
    # The teacher's weights are compared, not their path; earlier versions stored only the path.
    free = ["teacher-checkpoint"] if "teacher" in stored else []
    _check_same_run(stored["config"], config, f"checkpoint {path}", free)
    return stored


def _stored_config(folder: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load((folder / run_folder.CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, dict):
        raise ConfigError(f"output-dir {folder} holds a run without a readable config.yaml: choose another")
    return stored


def _check_same_run(
    stored: dict[str, Any], config: Config, where: str, free: Sequence[str] = (), advice: str = ""
) -> None:
    if found := differences(stored, config, free):
        line = f"{where} holds a different run: {differences_told(found)}"
        raise ConfigError(f"{line}; {advice}" if advice else line)


def check_identity(stored: dict[str, Any], identity: dict[str, Any], config: Config) -> None:
    """ConfigError where a checkpoint's run began with another data set, or another teacher's weights."""
    now, then = identity["data"], stored.get("data")  # earlier versions stored none
    if then is not None and then != now:
        differing = {key: (then.get(key), now[key]) for key in now if then.get(key) != now[key]}
        told = [f"{key}: {a}, now {b}" for key, (a, b) in differing.items() if key != "files"]
        raise ConfigError(
            f"data-dir {config.data_dir} holds different images from those this run began with "
            f"({'; '.join(told) or 'other files or labels'})"
        )
    if stored.get("teacher", identity["teacher"]) != identity["teacher"]:
        raise ConfigError(
            f"teacher-checkpoint {config.teacher_checkpoint} holds different weights from those this run "
            "began with"
        )


def changed_code(stored: dict[str, Any], identity: dict[str, Any], config: Config) -> list[str]:
    """A line for each network whose own code is no longer what a checkpoint's run was made of.

    It may have changed in a comment alone, so the run goes on.
    """
    lines = []
    for key, now in identity["code"].items():
        then = stored.get("code", {}).get(key, {})  # earlier versions stored none
        if changed := [name for name in now if then.get(name, now[name]) != now[name]]:
            files = ", ".join(str(getattr(sys.modules.get(name), "__file__", name)) for name in changed)
            lines.append(
                f"warning: {key} {getattr(config, key)}: {files} changed since the checkpoint was written; "
                "the run goes on with the code as it is now"
            )
    return lines


def differences(old: dict[str, Any], new: Config, free: Iterable[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Keys in which the configuration stored by a run differs from `new`, with both values, in that order.

    Left out are those that are free to change, here also `free`. A key that did not exist when the run was
    stored had its default.
    """
    fields = Config.model_fields.items()
    defaults = {name.replace("_", "-"): field.default for name, field in fields if not field.is_required()}
    old, current = defaults | old, new.model_dump(mode="json", by_alias=True)
    differing = (k for k in old.keys() | current.keys() if old.get(k) != current.get(k))
    kept = sorted(str(k) for k in differing if k not in (*FREE_KEYS, *free))
    return {key: (old.get(key), current.get(key)) for key in kept}


def differences_told(found: dict[str, tuple[Any, Any]]) -> str:
    """`differences` in words."""
    values = (f"{key} {flag_text(old)}, now {flag_text(new)}" for key, (old, new) in found.items())
    return f"{', '.join(found)} differ ({'; '.join(values)})"
