"""Trainings small enough for a test, alone and over ranks: how they start, and what they write."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

import train

SMALL = {
    "dataset": "digits",
    "limit-train": 200,
    "limit-test": 100,
    "batch-size": 64,  # 3 batches and one of 8
    "epochs": 3,
    "student": "wrn-10-1",
    "lr-schedule": "onecycle",
    "threads": 1,
}
DISTRIBUTED = {
    "dataset": "digits",
    "limit-train": 203,  # three batches of 64 and one of 11, which neither 2 nor 4 ranks share equally
    "limit-test": 103,
    "batch-size": 64,
    "test-batch-size": 16,
    "epochs": 2,
    "student": "wrn-10-1",
    "lr": 0.0005,  # a higher one lets fp32's roundings grow beyond 1e-5 in 20 steps
    "lr-schedule": "cosine",
    "freeze-bn": "true",
    "threads": 1,
    "device": "cpu",
}
TIMING = ("seconds", "images_per_second")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CLASSES = ("ant", "bee", "cat")


def flags(keys: dict[str, Any]) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def dashed(keys: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments, spelt as recipes and flags are."""
    return {key.replace("_", "-"): value for key, value in keys.items()}


def run(folder: Path, **keys: Any) -> int:
    """The exit code of train.py in this process; a fixture restores the number of threads that it sets."""
    return train.main(flags(SMALL | dashed(keys) | {"output-dir": folder}))


def metrics(folder: Path, timing: bool = False) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines if timing else [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def check_same(folder: Path, undisturbed: Path) -> None:
    assert (folder / "model.pt").read_bytes() == (undisturbed / "model.pt").read_bytes()
    assert metrics(folder) == metrics(undisturbed)
    kept = [name for name in os.listdir(folder) if not name.startswith("events.")]
    assert sorted(kept) == sorted(n for n in os.listdir(undisturbed) if not n.startswith("events."))


def check_refusal(code: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("train.py: error: ")
    for word in words:
        assert word in err


def command(ranks: int, folder: Path, **keys: Any) -> list[str]:
    values = DISTRIBUTED | dashed(keys) | {"output-dir": folder}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, str(ROOT / "train.py"), *flags(values)]


def launch(ranks: int, folder: Path, **keys: Any) -> subprocess.CompletedProcess[str]:
    line = command(ranks, folder, **keys)
    return subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def compile_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let modules be traced and run as graphs; test_trainer's compiled run also generates their code."""
    compile_ = torch.nn.Module.compile

    def traced(module: torch.nn.Module, *, dynamic: bool, options: dict[str, Any]) -> None:
        compile_(module, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)


def in_a_child(work: Callable[[], int]) -> int:
    """The number of a forked process, which needs no imports of its own."""
    if torch.cuda.is_available():
        pytest.skip("where there is CUDA, autograd's threads do not survive a fork")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begin_as_a_program(out: int, err: int) -> None:
    """Undo in a forked process what pytest has done to streams, signals and warnings."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = (open(number, "w") for number in (1, 2))  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def show(*warning: Any, **places: Any) -> None:
        sys.stderr.write(warnings.formatwarning(*warning[:4]))

    warnings.resetwarnings()
    for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", hidden)
    warnings.showwarning = show


class Forked(subprocess.Popen[Any]):
    """A command that starts train.py, run in a fork of this process: for what becomes of a run.

    How the interpreter starts and ends, which takes most of a short run's time, is not tested by it.
    """

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *options: Any) -> None:
        _, _, cwd, env, _, _, _, *pipes = options[:13]
        new_session = options[18]
        if torch.cuda.is_available():  # see `in_a_child`
            return super()._execute_child(args, executable, preexec_fn, *options)  # type: ignore[misc]
        words = [str(word) for word in args]
        (script,) = (place for place, word in enumerate(words) if Path(word).name == "train.py")

        def work() -> int:
            for stream in (self.stdin, self.stdout, self.stderr):
                if stream:
                    stream.close()  # the other end of a pipe is the parent's alone
            begin_as_a_program(*(1 if fd == -1 else fd for fd in (pipes[3], pipes[5])))
            if new_session:
                os.setsid()
            os.chdir(cwd or ".")
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            if preexec_fn:
                preexec_fn()
            return train.main(words[script + 1 :])

        self.pid = in_a_child(work)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def forked(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` with its output captured, through `Forked`."""
    pipe = subprocess.PIPE
    with Forked(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **options) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Until it holds; an error where the process ends before, or hangs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"ended with code {process.returncode} before its time"
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.005)


def fork_trainings(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let the trainings that a module starts be forks of this process."""

    def call(*arguments: Any, **options: Any) -> int:
        return Forked(*arguments, **options).wait()

    names = SimpleNamespace(Popen=Forked, call=call, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(module, "subprocess", names)


def free_port() -> int:
    """A port on which nobody listens, below those that systems give out: nobody gets it until it is used."""
    while True:
        port = random.SystemRandom().randrange(10000, 30000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def fork_ranks(
    ranks: int, folder: Path, main: Callable[[list[str]], int] = train.main, **keys: Any
) -> subprocess.CompletedProcess[str]:
    """Like `launch`, but faster: without torchrun and the imports."""
    if torch.cuda.is_available() and main is train.main:  # see `in_a_child`
        return launch(ranks, folder, **keys)
    words = flags(DISTRIBUTED | dashed(keys) | {"output-dir": folder})
    port = free_port()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def work(rank: int) -> int:
            signal.alarm(300)
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in (numbers | address).items()}
            begin_as_a_program(out.fileno(), err.fileno())
            return main(words)

        children = [in_a_child(partial(work, rank)) for rank in range(ranks)]
        codes = [code_of(child) for child in children]
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(words, next(filter(None, codes), 0), *texts)


def results(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, torch.load(folder / "model.pt", weights_only=True)


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(256, size=(height, width, 3), dtype=np.uint8))


def make_folders(root: Path, train: int = 8, val: int = 3) -> Path:
    """`train` and `val` random images of each class."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(1000 * label + 10 * i + (split == "val")).save(folder / f"{i}.png")
    return root
