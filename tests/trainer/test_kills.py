"""SIGKILL at chosen and at random moments: the run that continues is bitwise the undisturbed one.

`make soak` asks for more of the random ones through AT_FUSED_SOAK.
"""

from __future__ import annotations

import itertools
import os
import pkgutil
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import cases
import pytest
from paths import ROOT
from runs import ENVIRONMENT, SMALL, check_same, code_of, command, flags, fork_ranks, in_a_child

import train

KEYS = SMALL | {"epochs": 2, "checkpoint-every": 2}  # 8 steps, 4 checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with a teacher, AT and KD."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert train.main(flags(SMALL | {"student": "wrn-10-2", "epochs": 1, "output-dir": folder})) == 0
    teacher = {"teacher": "wrn-10-2", "teacher-checkpoint": folder / "model.pt"}
    return KEYS | {"method": "at+kd"} | teacher


@pytest.fixture(scope="module")
def whole(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(flags(keys | {"output-dir": folder})) == 0
    return folder


def fatal(target: str, call: int) -> None:
    """Make the given call of the function `target` the last thing that this process does."""
    owner_name, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner_name)
    original, calls = getattr(owner, name), itertools.count(1)

    def deadly(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, deadly)


@pytest.mark.parametrize(
    "target, call",
    [
        ("trainer.loop.evaluate", 1),  # before anything is written
        ("trainer.loop.backward", 7),
        ("torch.optim.SGD.step", 5),
        ("trainer.loop.evaluate", 2),  # the teacher's
        ("trainer.loop.evaluate", 3),
        ("trainer.checkpoint.save", 1),
        ("trainer.checkpoint.save", 4),
        ("os.fsync", 4),  # before a checkpoint's bytes are safe
        ("os.fsync", 5),
        ("os.link", 2),  # before the previous checkpoint has its second name
        ("os.replace", 5),
        ("os.replace", 6),
        ("os.replace", 7),
        ("trainer.results.write_metrics", 2),
        ("trainer.results.write_curves", 1),  # the training is over, its results are not written
        ("trainer.results.write_summary", 1),
    ],
)
def test_killed_at(target: str, call: int, keys: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    words = flags(keys | {"output-dir": tmp_path / "run"})

    def work() -> int:
        fatal(target, call)
        return train.main(words)

    assert code_of(in_a_child(work)) == -signal.SIGKILL, "the moment never came"
    assert train.main(words) == 0
    check_same(tmp_path / "run", whole)


def test_killed_at_random(keys: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Twenty times in one run's life, each somewhere in the time that is left to it."""
    words = flags(keys | {"output-dir": tmp_path / "run"})
    begun = time.perf_counter()
    assert code_of(in_a_child(lambda: train.main(flags(keys | {"output-dir": tmp_path / "timed"})))) == 0
    seconds = time.perf_counter() - begun
    draw, killed = random.Random(0), 0
    for _ in range(20 * cases.SOAK):
        child = in_a_child(lambda: train.main(words))
        time.sleep(draw.uniform(0, seconds / 2))
        os.kill(child, signal.SIGKILL)
        killed += code_of(child) == -signal.SIGKILL
        if (tmp_path / "run" / "summary.json").exists():
            check_same(tmp_path / "run", whole)
            for path in (tmp_path / "run").iterdir():
                path.unlink()
    assert killed >= 5, "a run was over before its time"
    assert train.main(words) == 0
    check_same(tmp_path / "run", whole)


def workers_of(launcher: int) -> list[int]:
    """Processes that torchrun has started and that run."""
    found = []
    with suppress(OSError):  # of a process that has just ended
        lists = [path.read_text().split() for path in Path(f"/proc/{launcher}/task").glob("*/children")]
        for pid in itertools.chain(*lists):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            if not fields["State"].startswith("Z") and "python" in fields["Name"]:
                found.append(int(pid))
    return sorted(found)


def time_of(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def test_a_rank_is_killed_under_elastic_restart(tmp_path: Path) -> None:
    """torchrun starts both ranks again, and they continue by themselves: killed once they have, each time."""
    options = {"epochs": 16 * cases.SOAK, "freeze_bn": "false", "checkpoint_every": 3}
    assert fork_ranks(2, tmp_path / "whole", **options).returncode == 0
    folder, kills, draw = tmp_path / "run", 2 * cases.SOAK, random.Random(1)
    line = command(2, folder, **options)
    line.insert(line.index("--standalone"), f"--max-restarts={kills}")
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
        pair: list[int] = []
        found, killed = None, 0
        deadline = time.monotonic() + 300 * kills  # a limit for what hangs
        while launcher.poll() is None and time.monotonic() < deadline:
            workers = workers_of(launcher.pid)
            if len(workers) == 2 and not set(workers) & set(pair):
                pair, found = workers, time_of(folder / "checkpoint.pt")
            elif workers == pair and killed < kills and time_of(folder / "checkpoint.pt") != found:
                time.sleep(draw.uniform(0, 0.1))
                os.kill(draw.choice(pair), signal.SIGKILL)
                killed += 1
                found = time_of(folder / "checkpoint.pt")
            time.sleep(0.02)
    assert launcher.poll() == 0, (tmp_path / "log").read_text()[-3000:]
    assert killed == kills
    check_same(folder, tmp_path / "whole")
