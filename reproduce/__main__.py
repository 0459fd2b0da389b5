"""Reproduction of the paper's tables: trains every cell and compares it with the published figure.

    python -m reproduce table1 --schedule short --data-dir DIR --seeds 2 --jobs 2 --out runs/paper

It keeps finished runs and continues interrupted ones, so the same command can be given again at any time.
Tables share runs. The results are in OUT/SCHEDULE: TABLE.json, TABLE.md and, as Figure 7, TABLE.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from at_fused._terminal import lenient_output
from reproduce import jobs, report
from reproduce.command_line import Parser, absolute, exclusive, folder, positive
from reproduce.tables import TABLES, Plan
from trainer.config import KEYS
from trainer.errors import ConfigError, did_you_mean


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a training fails or can't be measured, 2 after a mistake (one line)."""
    try:
        args = _parse(argv)
        plan = Plan(
            table=args.table,
            schedule=args.schedule,
            out=args.out,
            data_dir=args.data_dir,
            rows=args.rows,
            columns=args.columns,
            seeds=args.seeds,
            epochs=args.epochs,
            threads=args.threads,
            teacher_checkpoint=args.teacher_checkpoint,
            known=args.known,
            keys=dict(args.set),
        )
        todo = plan.jobs  # raises for a mistake before anything is written
        if args.measure:
            return 0 if jobs.estimate(todo, partial(print, flush=True)) else 1
        if args.dry_run:
            for line in jobs.listing(todo):
                print(line, flush=True)
            jobs.check_data(todo)
            return 0
        with exclusive(plan.folder):
            failed = jobs.run(todo, plan.folder / "logs", args.jobs, lambda: report.write(plan))
            print(report.write(plan))
    except ConfigError as error:
        print(f"reproduce: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"reproduce: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("table", choices=TABLES)
    add(
        "--schedule", default="paper", choices=["paper", "short"], help="of the paper (default), or 12 epochs"
    )
    add("--rows", nargs="+", metavar="ROW", help="such as wrn-16-1-from-wrn-16-2 (default: all)")
    add("--columns", nargs="+", metavar="COLUMN", help="such as student at (default: what the paper reports)")
    add(
        "--seeds",
        type=positive,
        metavar="N",
        help="train seeds 0 to N-1 (default: as many as the paper), of teachers only seed 0",
    )
    add("--epochs", type=positive, metavar="N", help="instead of the schedule's, which shrinks in proportion")
    add("--data-dir", required=True, type=absolute, metavar="DIR", help="as for train.py")
    add("--out", required=True, type=folder, metavar="DIR", help="where runs and results go")
    add("--teacher-checkpoint", type=absolute, metavar="FILE", help="use these weights, train no teacher")
    add(
        "--set",
        nargs="+",
        type=_pair,
        default=[],
        metavar="KEY=VALUE",
        help="recipe keys of every run, such as amp=bf16 channels-last=true compile=true",
    )
    add(
        "--known",
        nargs="+",
        type=absolute,
        default=[],
        metavar="FILE",
        help="a TABLE.json, of another table or machine, whose runs need not be trained again",
    )
    add(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="trainings at a time, on one GPU too (default 1)",
    )
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of each training")
    add("--dry-run", action="store_true", help="list the runs, and look whether their data are there")
    add(
        "--measure",
        action="store_true",
        help="list the runs, and how long they would take: a few steps of each recipe are run",
    )
    return parser.parse_args(argv)


GIVEN_KEYS = ("seed", "epochs", "threads", "data-dir", "output-dir", "teacher-checkpoint", "dataset")
CELL_KEYS = (  # what makes a cell the one that it is called
    *("student", "teacher", "method", "taps", "p", "mapping", "distance", "norm-order"),
    *("beta", "beta-schedule", "at-start-epoch"),
)


def _pair(text: str) -> tuple[str, str]:
    typed, equals, value = (part.strip() for part in text.partition("="))
    key = typed.replace("_", "-")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    if key in GIVEN_KEYS + CELL_KEYS:
        raise argparse.ArgumentTypeError(f"{key} is given by the table or a flag of its own")
    if key not in KEYS:
        raise argparse.ArgumentTypeError(f"unknown key {typed}{did_you_mean(key, KEYS)}")
    return key, value


if __name__ == "__main__":
    sys.exit(main())
