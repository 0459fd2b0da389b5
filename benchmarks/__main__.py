"""Side-by-side measurements: `python -m benchmarks --device cpu --suite loss --out runs/bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from at_fused._terminal import lenient_output
from at_fused.visualize.paths import user_path
from benchmarks import report, suites
from benchmarks.report import Row


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options: those of every suite, and those of the suite that is named."""
    prog = "python -m benchmarks"
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=f"{prog} --suite NAME --help shows that suite's own flags, too",
    )
    parser.add_argument("--suite", choices=suites.NAMES, required=True)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default: the suite's own)")
    parser.add_argument("--batch", type=int, help="another batch size than the real one")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="tiny batches, few rounds: does it run at all?")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds, measure the rest")
    first = argparse.ArgumentParser(prog=prog, add_help=False)
    first.add_argument("--suite")
    name = first.parse_known_args(argv)[0].suite
    if name in suites.NAMES:
        suites.load(name).arguments(parser)
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = 3 if options.quick else suites.load(name).ROUNDS
    if options.batch is None and options.quick:
        options.batch = 2
    if options.rounds < 1 or (options.batch is not None and options.batch < 1):
        parser.error("--rounds and --batch must be at least 1")
    return options


def check_device(device: torch.device) -> None:
    """ValueError where nothing can be measured on `device`."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is cpu or cuda, not {device.type}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device that torch can use")


def run(options: argparse.Namespace, device: torch.device) -> str:
    """Measure a suite and write its files, anew after each piece; returns the page."""
    suite, stem = suites.load(options.suite), f"{options.suite}-{device.type}"
    machine = report.describe_machine(device)
    rows: list[Row] = report.read(options.out, stem).get("rows", []) if options.resume else []
    for found in suite.measure(options, device, rows):
        rows += found
        suite.result(rows, options, device).write(options.out, stem, rows, machine)
    result = suite.result(rows, options, device)
    if result.draw:
        result.draw(options.out / f"{stem}.png", machine)
    return result.write(options.out, stem, rows, machine)


@lenient_output()
def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        device = torch.device(options.device)
        check_device(device)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        print("\n" + run(options, device))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
