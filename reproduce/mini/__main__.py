"""Tables 4 and 5 in minutes, on any folder of images: what `make mini` runs.

    python -m reproduce.mini --data-dir DIR --out runs/mini

DIR holds train and val (or test), with a folder for each class. A little more than half of the classes take
the place of ImageNet: Table 5 trains its teacher and students on them from scratch. The others take the place
of Scenes: Table 4 fine-tunes the teacher and the student of Table 5 on them. The recipes are small versions
of the paper's (recipes/mini).

It keeps finished trainings and continues interrupted ones. OUT/mini.md has the errors and the likeness of the
maps; OUT/maps-table5.png and OUT/maps-table4.png show the maps like Figure 6, before and after transfer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from at_fused._terminal import lenient_output
from reproduce import jobs
from reproduce.command_line import Parser, absolute, exclusive, folder, positive
from reproduce.mini import plan
from trainer.errors import ConfigError


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a training has failed, 2 after a mistake (one line)."""
    begun = time.perf_counter()
    try:
        args = _parse(argv)
        with exclusive(args.out):
            pretraining, finetuning = plan.split(args.data_dir, args.out / "data")
            runs = plan.plan(args.out, pretraining, finetuning, args.epochs)
            # The student that Table 4 starts from is one of the first, so these may go side by side.
            first = [*runs.table5.values(), runs.table4["teacher"]]
            for todo in (first, list(runs.table4.values())):
                if jobs.run(todo, args.out / "logs", args.jobs, lambda: None):
                    return 1
    except ConfigError as error:
        print(f"reproduce.mini: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    from reproduce.mini import report  # matplotlib takes a second: only those who report pay

    print(report.write(args.out, runs))
    print(f"{time.perf_counter() - begun:.0f} s; errors and maps: {', '.join(report.FILES)} in {args.out}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m reproduce.mini",
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
