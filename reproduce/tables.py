"""The paper's tables as jobs to train, cell by cell, read from recipes/tables.yaml."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from trainer import checkpoint, run_folder
from trainer.config import Config, make_config
from trainer.errors import ConfigError
from trainer.recipes import load_recipe
from trainer.resume import differences, differences_told

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TABLES: dict[str, Any] = yaml.safe_load((RECIPES / "tables.yaml").read_text(encoding="utf-8"))
LABELS: dict[str, str] = TABLES.pop("labels")
BASELINE, TEACHER = "student", "teacher"  # columns
ERRORS = ("last_test_error", "best_test_error")  # of a run, in percent
CURVES = ("test_error", "train_error")  # epoch by epoch


@dataclass(frozen=True)
class Job:
    """One training: its configuration, and the job whose weights it needs."""

    name: str
    config: Config
    teacher: Job | None = None

    @property
    def folder(self) -> Path:
        return Path(str(self.config.output_dir))

    def summary(self) -> dict[str, Any] | None:
        """The results of a finished run, else None; ConfigError where the folder holds another run."""
        try:
            stored = self.stored_config()
            if found := differences(stored, self.config):
                raise ConfigError(f"{self.folder} holds a different run: {differences_told(found)}")
            summary = run_folder.read_summary(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        long_enough = _long_enough(stored, summary["epochs"], self.config) or self._has_every_epoch()
        return summary if long_enough else None

    def _has_every_epoch(self) -> bool:
        """By the checkpoint: max-steps may have ended the last epoch early."""
        found = checkpoint.load_latest(self.folder)
        return found is not None and len(found[0]["progress"]["history"]) == self.config.epochs

    def stored_config(self) -> dict[str, Any]:
        """The configuration that the run has written; paths follow a folder that was moved."""
        config = run_folder.read_config(self.folder)
        if "output-dir" not in config:
            raise ConfigError(f"{self.folder}/config.yaml is not a run's")
        old, new = (str(path).removesuffix(self.name) for path in (config["output-dir"], self.folder))
        moved = {key: value for key, value in config.items() if old and str(value).startswith(old)}
        return config | {key: new + value.removeprefix(old) for key, value in moved.items()}

    def history(self) -> list[dict[str, Any]]:
        """Metrics of the epochs so far."""
        return run_folder.read_metrics(self.folder)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a job per seed, and the errors that the paper reports, in percent."""

    row: str
    column: str
    recipe: str
    jobs: list[Job]
    paper: float | None
    paper_top5: float | None = None

    @property
    def pair(self) -> str:
        return self.row.replace("-from-", " ← ")

    @property
    def label(self) -> str:
        return LABELS.get(self.column, self.column)


@dataclass(frozen=True)
class Plan:
    """The chosen cells of a table.

    Runs are in `out`/`schedule`, by recipe and seed, so that tables share them. With `teacher_checkpoint` no
    teacher is trained. Runs that a file of `known` (a TABLE.json) holds with the same configuration count as
    finished, unless others need their weights. Such a file has only the name of a teacher from elsewhere:
    files of the same name count as the same. `keys` win over those of every recipe.

    Raises:
        ConfigError: (from `cells` and `jobs`) unknown rows or columns, a schedule that the table does not
            have, a recipe or combination of keys that train.py would refuse, a `teacher_checkpoint` for cells
            of several teachers or of none, or a file of `known` that is no table.
    """

    table: str
    schedule: str
    out: Path
    data_dir: Path
    rows: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    seeds: int | None = None
    epochs: int | None = None
    threads: int = 0
    teacher_checkpoint: Path | None = None
    known: Sequence[Path] = ()
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.out / self.schedule

    @property
    def title(self) -> str:
        return str(TABLES[self.table]["title"])

    @cached_property
    def cells(self) -> list[Cell]:
        table = TABLES[self.table]
        if self.schedule not in table["schedules"]:
            raise ConfigError(
                f"{self.table} has no schedule {self.schedule}: {', '.join(table['schedules'])}"
            )
        rows = _chosen("rows", self.rows, list(table["rows"]), self.table)
        known = list(dict.fromkeys(column for row in table["rows"].values() for column in row))
        columns = _chosen("columns", self.columns, known, self.table)
        seeds = table["seeds"] if self.seeds is None else self.seeds
        cells: list[Cell] = []
        taught_by: dict[str, None] = {}  # teachers' recipes, in order
        for name in rows:
            row = table["rows"][name]
            wanted = {column: row[column] for column in columns if column in row}
            teachers = {self._teacher_recipe(row, column) for column, cell in row.items() if "paper" in cell}
            for column, cell in wanted.items():
                if self.columns is None and "paper" not in cell and cell["recipe"] not in teachers:
                    continue
                teaches = cell["recipe"] in teachers
                if teaches and self.teacher_checkpoint:
                    continue
                numbers = range(1 if teaches else seeds)
                jobs = [self._job(cell, self._teacher_recipe(row, column), seed) for seed in numbers]
                if jobs[0].config.teacher:
                    taught_by[self._teacher_recipe(row, column)] = None
                paper = [cell.get(key) for key in ("paper", "paper_top5")]
                cells.append(Cell(name, column, cell["recipe"], jobs, *paper))
        if self.teacher_checkpoint and len(taught_by) != 1:
            raise ConfigError(
                "teacher-checkpoint serves one teacher's students, the chosen cells have "
                f"{', '.join(taught_by) or 'no teacher'}: choose with rows and columns"
            )
        return cells

    @cached_property
    def jobs(self) -> list[Job]:
        """Every job once (cells share some): teachers first, then by seed, so that methods compare early."""
        every = [job for cell in self.cells for job in cell.jobs if self.known_run(job) is None]
        teachers = {job.teacher.name: job.teacher for job in every if job.teacher}
        return list(
            (teachers | {job.name: job for job in sorted(every, key=lambda j: j.config.seed)}).values()
        )

    def known_run(self, job: Job) -> dict[str, Any] | None:
        """The entry of this run in a file of `known`, as `reproduce.report` writes it."""
        wanted = make_config(without_paths(job.config.model_dump(mode="json", by_alias=True), self.folder))
        for run in self._known_runs.get(job.name, []):
            same = not differences(run["config"], wanted)
            if same and _long_enough(run["config"], len(run["test_error"]), wanted):
                return run
        return None

    @cached_property
    def _known_runs(self) -> dict[str, list[dict[str, Any]]]:
        """By the job's name; several files may hold it with different configurations."""
        runs: dict[str, list[dict[str, Any]]] = {}
        for path in self.known:
            try:
                cells = json.loads(path.read_text())["cells"]
                found = [
                    (f"{cell['recipe']}/seed{run['seed']}", run) for cell in cells for run in cell["runs"]
                ]
            except OSError as error:
                raise ConfigError(f"known {path}: {error.strerror}") from None
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"known {path}: not the JSON of a table's results") from None
            for name, run in found:
                try:
                    runs.setdefault(name, []).append(_checked(run))
                except ConfigError as error:
                    raise ConfigError(f"known {path}: {name}: {error}") from None
        return runs

    @staticmethod
    def _teacher_recipe(row: dict[str, Any], column: str) -> str:
        return str(row[column].get("teacher", row[TEACHER]["recipe"]))

    def _job(self, cell: dict[str, Any], teacher_recipe: str, seed: int) -> Job:
        recipe = cell["recipe"]
        keys = load_recipe(RECIPES / f"{recipe}.yaml")
        if self.schedule != "paper":
            keys |= load_recipe(_overlay(self.schedule, recipe))
        if self.epochs is not None:
            keys = with_epochs(keys, self.epochs)
        keys |= self.keys
        name = f"{recipe}/seed{seed}"
        keys |= {"seed": seed, "threads": self.threads, "output-dir": str(self.folder / name)}
        keys["data-dir"] = str(self.data_dir / cell.get("folder", ""))
        teacher = None
        if keys.get("teacher"):
            if self.teacher_checkpoint is None:
                teacher = self._job(cell | {"recipe": teacher_recipe}, "", 0)
            weights = self.teacher_checkpoint or (teacher and teacher.folder / run_folder.MODEL)
            keys["teacher-checkpoint"] = str(Path(str(weights)).resolve())
        try:
            return Job(name, make_config(keys), teacher)
        except ConfigError as error:
            raise ConfigError(f"{self.table} can't run: recipes/{recipe}.yaml: {error}") from None


def without_paths(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`config` without the paths of this machine: relative to `folder`, or else only the name."""

    def short(value: Any) -> Any:
        if not isinstance(value, str) or not Path(value).is_absolute():
            return value
        path = Path(value)
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name

    return {key: short(value) for key, value in config.items()}


def _checked(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run of a known file, with every key of its configuration; ConfigError if it can't be used."""
    if lacking := [key for key in ("config", *ERRORS, *CURVES) if run.get(key) is None]:
        raise ConfigError(f"{lacking[0]} is missing")
    if not isinstance(run["config"], dict):
        raise ConfigError("config: expected the keys of a recipe")
    config = make_config(run["config"] | {"backend": "auto"})  # its own may not be available here
    errors = {key: [run[key]] for key in (*ERRORS, "last_test_top5_error") if key in run}
    for key, values in (errors | {key: run[key] for key in CURVES}).items():
        if not isinstance(values, list) or not values or not all(map(_is_percentage, values)):
            raise ConfigError(f"{key}: expected {'percentages' if key in CURVES else 'a percentage'}")
    if len({len(run[key]) for key in CURVES}) > 1:
        raise ConfigError(f"{' and '.join(CURVES)} tell of different epochs")
    keys = config.model_dump(mode="json", by_alias=True) | {"backend": run["config"].get("backend", "auto")}
    return dict(run) | {"config": keys}


def _is_percentage(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 100


def _long_enough(stored: Mapping[str, Any], epochs: int, wanted: Config) -> bool:
    """Whether a finished run of so many (begun) epochs is certainly as long as `wanted`."""
    steps = stored.get("max-steps")
    if steps is None:
        return epochs == wanted.epochs
    return wanted.max_steps is not None and steps >= wanted.max_steps


def with_epochs(keys: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """A recipe's keys with another number of epochs; what happens at an epoch moves in proportion."""
    keys = dict(keys)
    if start := keys.get("at-start-epoch"):
        keys["at-start-epoch"] = start * epochs // keys["epochs"]
    for name in ("lr", "beta"):
        milestones = keys.get(f"{name}-milestones")
        if milestones and keys.get(f"{name}-schedule", "step") == "step":  # else they mean nothing
            keys[f"{name}-milestones"] = [-(-epoch * epochs // keys["epochs"]) for epoch in milestones]
    return keys | {"epochs": epochs}


def _overlay(schedule: str, recipe: str) -> Path:
    """The recipe of a schedule, whose keys win: the one in the recipe's own folder, if there is one."""
    own = RECIPES / Path(recipe).parts[0] / f"{schedule}.yaml"
    return own if own.exists() else RECIPES / schedule / "base.yaml"


def _chosen(what: str, asked: Sequence[str] | None, known: list[str], table: str) -> list[str]:
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise ConfigError(f"{table} has no {what} {', '.join(unknown)}; it has {', '.join(known)}")
    return known if asked is None else [name for name in known if name in asked]
