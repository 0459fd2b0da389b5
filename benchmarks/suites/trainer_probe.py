"""What only a process of its own can tell of train.py: when its first step ends, its peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PHASES = ("imports", "data", "models", "first step", "rest")
EAGER = "--eager"  # instead of train.py's own AT term: the authors' form


class Enough(BaseException):
    """The steps asked for are done."""


def start_up(flags: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Seconds from the start of a process `train.py flags` to the end of its first step, by PHASES.

    The rest is the configuration, the output folder, TensorBoard and the first batch.
    """
    started = time.time()
    told = _child("start-up", flags, environment)
    total = told.pop("ended") - started
    found = {phase: told.get(phase, 0.0) for phase in PHASES[:-1]}
    found["imports"] = told["imported"] - started
    return found | {"rest": total - sum(found.values()), "total": total}


def peak_bytes(flags: Sequence[str], eager: bool = False) -> int:
    """The most memory that a process `train.py flags` holds in its first three steps (Linux only)."""
    # glibc keeps what is freed below a threshold that it raises as it goes: fixed, it gives everything back
    returning = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    return int(_child("memory", [*flags, *[EAGER] * eager], returning)["peak"])


def _child(what: str, flags: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What this module, run as a program, prints.

    Raises:
        RuntimeError: it failed; its last line says why.
    """
    command = [sys.executable, "-m", __name__, what, *flags]
    root = str(Path(__file__).parents[2])
    variables = os.environ | (environment or {})
    child = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        raise RuntimeError(f"train.py {' '.join(flags)}: {(child.stderr.splitlines() or ['no output'])[-1]}")
    told: dict[str, Any] = json.loads(lines[-1])
    return told


def main(argv: Sequence[str]) -> int:
    what, *flags = argv
    import train
    from trainer import data, loop
    from trainer.run import Run

    told: dict[str, float] = {"imported": time.time()}

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begun = time.time()
            try:
                return function(*args, **options)
            finally:
                told[phase] = told.get(phase, 0.0) + time.time() - begun

        return call

    step = timed("first step", loop.train_step)

    def stop_after_steps(run: Run, *args: Any) -> None:
        if EAGER in flags:
            _use_eager_form(run)
        if what == "memory" and run.progress.step == 0:
            # What reading the data took at its peak is forgotten.
            Path("/proc/self/clear_refs").write_text("5")
        step(run, *args)
        if what == "start-up" or run.progress.step == 2:
            raise Enough

    loop.train_step = stop_after_steps  # type: ignore[assignment]
    Run._create_models = timed("models", Run._create_models)  # type: ignore[method-assign]
    data.load = timed("data", data.load)
    try:
        return train.main([flag for flag in flags if flag != EAGER]) or 1  # the steps ran out: no figure
    except Enough:
        told["ended"] = time.time()
        if what == "memory":
            told["peak"] = _high_water()
        print(json.dumps(told), flush=True)
        os._exit(0)  # workers and threads have nothing left to do


def _use_eager_form(run: Any) -> None:
    """Replace the method's term by the authors' form on the features."""
    import at_fused
    from benchmarks.loss.providers import authors

    method = run.method
    method.transfer.close()
    networks = (method.student, method.names), (method.teacher, method.t_names)
    taps = [at_fused.FeatureTaps(*network) for network in networks]

    def term(batch: Any, beta: float) -> Any:
        students, teachers = (side.features for side in taps)
        terms = [beta * authors([s], [t]) for s, t in zip(students, teachers, strict=True)]
        method.transfer.losses = {name: one.detach() for name, one in zip(method.names, terms, strict=True)}
        for side in taps:
            side.clear()
        return sum(terms)

    method.term = term


def _high_water() -> int:
    """Not `ru_maxrss`, in which a process inherits its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
