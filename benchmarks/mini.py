"""Tables 4 and 5 in minutes, on any folder of images: what `make mini` runs.

    python -m benchmarks.mini --data-dir DIR --out runs/mini

DIR holds train and val (or test), with a folder for each class. A little more than half of the classes stand
for ImageNet: Table 5's teacher and students are trained on them from scratch. The others stand for Scenes:
Table 4 fine-tunes the teacher and the student of Table 5 on them. The recipes are the paper's, shrunk
(recipes/mini).

Finished trainings are kept, interrupted ones continue. OUT/mini.md has the errors and how alike the maps are;
OUT/maps-table5.png and OUT/maps-table4.png show the maps as Figure 6, before and after attention transfer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import paper_runs
from benchmarks.command_line import Parser, absolute, exclusive, folder, positive
from benchmarks.paper_plan import RECIPES, Job, with_epochs
from trainer.config import ConfigError, load_recipe, make_config

# What Imagenette's folders hold: names for the pictures. Others are called as their folders.
IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
FEWEST_CLASSES = 5  # 3 and 2


@dataclass(frozen=True)
class Runs:
    """The trainings of both tables by their column, the teacher first; Table 4's start from Table 5's."""

    table5: dict[str, Job]
    table4: dict[str, Job]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a training has failed, 2 after a mistake, which is told in one line."""
    begun = time.perf_counter()
    try:
        args = _parse(argv)
        with exclusive(args.out):
            pretraining, finetuning = split(args.data_dir, args.out / "data")
            runs = plan(args.out, pretraining, finetuning, args.epochs)
            # The student that Table 4 starts from is one of the first, so these may go side by side.
            first = [*runs.table5.values(), runs.table4["teacher"]]
            for jobs in (first, list(runs.table4.values())):
                if paper_runs.run(jobs, args.out / "logs", args.jobs, lambda: None):
                    return 1
    except ConfigError as error:
        print(f"benchmarks.mini: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    from benchmarks import mini_report  # matplotlib takes a second: only those who report pay

    print(mini_report.write(args.out, runs))
    print(
        f"{time.perf_counter() - begun:.0f} s; errors and maps: {', '.join(mini_report.FILES)} in {args.out}"
    )
    return 0


def split(data_dir: Path, out: Path) -> tuple[Path, Path]:
    """Two data sets, as folders of links: the first classes of `data_dir` to pre-train on, the others to
    fine-tune on. Their numbers differ, so that the last layer has to be left out.

    Raises:
        ConfigError: `data_dir` is not what is expected, or `out` holds the links of another.
    """
    held_out = next((name for name in ("val", "test") if (data_dir / name).is_dir()), "val")
    try:
        names = sorted(path.name for path in (data_dir / "train").iterdir() if path.is_dir())
        missing = [name for name in names if not (data_dir / held_out / name).is_dir()]
    except OSError as error:
        raise ConfigError(f"data-dir {data_dir}: train: {error.strerror}") from None
    if missing or len(names) < FEWEST_CLASSES:
        fault = f"{held_out} has no {missing[0]}" if missing else f"{len(names)} classes"
        raise ConfigError(
            f"data-dir {data_dir}: expected the folders train and val (or test), each with the same "
            f"{FEWEST_CLASSES} or more folders of images ({fault})"
        )
    parts = out / "pretraining", out / "finetuning"
    for number, name in enumerate(names):
        part = parts[number > len(names) // 2]
        for source, target in (("train", "train"), (held_out, "val")):
            link = part / target / IMAGENETTE.get(name, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(data_dir / source / name)
            elif not link.samefile(data_dir / source / name):
                raise ConfigError(f"{out} links to other images than data-dir {data_dir}: choose another out")
    return parts


def plan(out: Path, pretraining: Path, finetuning: Path, epochs: int | None = None) -> Runs:
    """The trainings, in the recipes' epochs or `epochs`."""

    def job(recipe: str, data: Path, pretrained: Job | None = None, teacher: Job | None = None) -> Job:
        own = load_recipe(RECIPES / "mini" / f"{recipe}.yaml")
        if epochs is not None:
            own = with_epochs(own, epochs)
        own |= {"data-dir": str(data), "output-dir": str(out / recipe), "threads": 1}
        for key, source in (("pretrained", pretrained), ("teacher-checkpoint", teacher)):
            if source:
                own[key] = str(source.folder / "model.pt")
        return Job(recipe, make_config(own), teacher or pretrained)

    teacher, student = (job(f"table5/{name}", pretraining) for name in ("teacher", "student"))
    table5 = {"teacher": teacher, "student": student}
    table5["at"] = job("table5/at", pretraining, teacher=teacher)
    tuned = job("table4/teacher", finetuning, pretrained=teacher)
    table4 = {"teacher": tuned, "student": job("table4/student", finetuning, pretrained=student)}
    for name in ("kd", "at"):
        table4[name] = job(f"table4/{name}", finetuning, pretrained=student, teacher=tuned)
    return Runs(table5, table4)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("--data-dir", required=True, type=absolute, metavar="DIR", help="the images")
    add("--out", required=True, type=folder, metavar="DIR", help="where runs and results go")
    add("--epochs", type=positive, metavar="N", help="instead of the recipes'; at-start-epoch in proportion")
    add(
        "--jobs",
        type=positive,
        default=min(cores, 3),
        metavar="N",
        help="trainings at a time (default: the cores)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
