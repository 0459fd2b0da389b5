"""What programs say: it never costs their work or exit code, and shows from the first step how it goes."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from runs import SMALL, Forked, begin_as_a_program, dashed, flags, metrics, run, wait_until

import train
from at_fused import _terminal
from at_fused.visualize.__main__ import main as visualize
from trainer import checkpoint, distributed, reporting
from trainer.pace import Pace, clock

TINY = {"limit_train": 32, "batch_size": 8, "limit_test": 10, "epochs": 2}  # 4 steps an epoch
FULL = Path("/dev/full")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(folder: Path, **keys: Any) -> list[str]:
    return [sys.executable, "train.py", *flags(SMALL | dashed(TINY | keys) | {"output-dir": folder})]


# --- streams that can't take it ---------------------------------------------------------------------


class Broken(io.StringIO):
    """Fails from the given write on."""

    def __init__(self, good: int, error: OSError) -> None:
        super().__init__()
        self.good, self.error = good, error

    def write(self, text: str) -> int:
        self.good -= 1
        if self.good < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_breaks_costs_what_follows_and_no_more(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Broken(1, BrokenPipeError())
    monkeypatch.setattr(sys, name, stream)
    with _terminal.lenient_output():
        for line in ("one\n", "two\n", "three\n"):
            getattr(sys, name).write(line)
        _terminal.require_output()
    assert stream.getvalue() == "one\n"
    assert getattr(sys, name) is stream


def test_what_an_encoding_lacks_becomes_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (
        ("ascii", rb"l\xe4ufe \u2713 \udcff"),
        ("latin-1", b"l\xe4ufe \\u2713 \\udcff"),
        ("utf-8", "läufe ✓ \\udcff".encode()),  # the last is a byte of a file name in another encoding
    ):
        content = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding))
        with _terminal.lenient_output():
            print("läufe ✓ \udcff", end="")
        assert content.getvalue() == expected


def test_output_that_is_all_there_is_must_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(0, OSError(28, "No space left on device")))
    with _terminal.lenient_output():
        print("the configuration")
        with pytest.raises(OSError, match="No space left on device: 'stdout'"):
            _terminal.require_output()


def test_without_streams() -> None:
    """As a shell's >&- leaves it."""
    for before in (sys.stdout, sys.stderr):
        assert before is not None
    kept = sys.stdout
    try:
        sys.stdout = None  # type: ignore[assignment]
        with _terminal.lenient_output():
            print("nobody hears")
            _terminal.require_output()
    finally:
        sys.stdout = kept


@pytest.mark.slow
def test_a_reader_that_leaves_costs_nothing(tmp_path: Path) -> None:
    """`python train.py ... | head -1`."""
    process = subprocess.Popen(
        command(tmp_path / "run"),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("wrn-10-1 (77,850 parameters)")
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == ("", 0)
    assert len(metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        streams: dict[str, Any] = {"cwd": ROOT, "env": ENVIRONMENT, "stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run(command(tmp_path / "run"), **streams, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "run/summary.json").exists()
        done = subprocess.run([*command(tmp_path / "run"), "--print-config"], **streams, text=True)
        assert (done.returncode, done.stderr) == (2, "train.py: error: stdout: No space left on device\n")


@pytest.mark.slow
def test_a_name_that_the_terminal_can_not_show(tmp_path: Path) -> None:
    variables = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    options: dict[str, Any] = {"cwd": ROOT, "env": variables, "capture_output": True, "text": True}
    done = subprocess.run(command(tmp_path / "läufe"), **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"results in" in done.stdout
    assert r"l\xe4ufe" in done.stdout
    assert (tmp_path / "läufe/summary.json").exists()


def test_a_picture_whose_name_the_terminal_can_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    words = ["--model", "wrn-10-1", "--dataset", "digits", "--out", str(tmp_path / "bild_ä.png")]
    assert visualize(words) == 0
    assert capsys.readouterr().err == "visualize: random weights: wrn-10-1\n"
    assert rb"bild_\xe4.png: 4 images" in content.getvalue()
    assert (tmp_path / "bild_ä.png").exists()


def test_visualize_draws_whoever_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(0, BrokenPipeError()))
    assert visualize(f"--model wrn-10-1 --dataset digits --out {tmp_path}/a.png".split()) == 0
    assert (tmp_path / "a.png").exists()


def test_an_epoch_is_saved_before_it_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens then, also to TensorBoard, which gets it from the run that continues."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reporting.Reporter, "epoch", interrupt)
        assert run(tmp_path / "run", **TINY) == 130
    assert checkpoint.load(tmp_path / "run/checkpoint.pt")["progress"]["step"] == 4
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1]
    assert run(tmp_path / "run", **TINY) == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [4, 8]


# --- signals ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminal_that_closes(tmp_path: Path) -> None:
    """SIGHUP, and nobody reads any more: a checkpoint of that step is written."""
    process = Forked(
        command(tmp_path / "run", epochs=10**6, checkpoint_every=1, lr=1e-3, lr_schedule="constant"),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((tmp_path / "run/checkpoint.pt").exists, process)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert checkpoint.load(tmp_path / "run/checkpoint.pt")["progress"]["step"] >= 1


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert distributed.stop_signals() == [signal.SIGINT, signal.SIGTERM]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert distributed.stop_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


# --- how it goes ------------------------------------------------------------------------------------

FIGURES = r"loss \d+\.\d{4}  \d+ images/s  \d+:\d\d:\d\d left"


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock: 2 s a step of 8 images, 4 s for each of the tests between epochs of 2 steps."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace, seen = Pace(steps=1010, done=10), []
    for epoch in range(2):
        pace.begin_epoch()
        for step in range(2):
            now[0] += 2
            pace.step(11 + 2 * epoch + step, 8)
            seen.append(pace.figures(None if epoch == 0 and step == 0 else 12345.678))
        now[0] += 4
    assert seen == [
        f"4 images/s  {clock(2 * 999)} left",
        f"loss 1.235e+04  4 images/s  {clock(2 * 998)} left",
        f"loss 1.235e+04  4 images/s  {clock(10 / 3 * 997)} left",
        f"loss 1.235e+04  4 images/s  {clock(12 / 4 * 996)} left",
    ]
    assert [clock(seconds) for seconds in (0.4, 59.6, 3600 * 123 + 61)] == ["0:00:00", "0:01:00", "123:01:01"]


def test_lines_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One every so many seconds: with 0 every step, and none in a run as short as this."""
    assert run(tmp_path / "quiet", **TINY) == 0
    assert "images/s  0:" not in capsys.readouterr().out
    monkeypatch.setattr(reporting, "LINE_SECONDS", 0.0)
    assert run(tmp_path / "run", **TINY) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step", "epoch"))]
    assert len(lines) == 10
    for place, line in enumerate(lines):
        epoch, step = divmod(place, 5)
        told = f"epoch {epoch + 1}/2"
        expected = (
            rf"step {4 * epoch + step + 1}/8  {told}  {FIGURES}" if step < 4 else rf"{told}  test error .*"
        )
        assert re.fullmatch(expected, line), line
        assert len(line) <= 80


def test_the_loss_that_is_shown_is_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(reporting.Reporter, "step", lambda self, done, images, loss: seen.append(loss))
    assert run(tmp_path / "run", **TINY, accumulate=3) == 0
    means = [line["train_loss"] for line in metrics(tmp_path / "run")]
    assert [sum(seen[:4]) / 4, sum(seen[4:]) / 4] == pytest.approx(means, rel=1e-6)


@pytest.mark.slow
def test_the_bar_of_a_terminal(tmp_path: Path) -> None:
    """From the first step on, in 80 columns."""
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"COLUMNS": "80", "TERM": "xterm"}
        code = 99
        try:
            begin_as_a_program(1, 2)
            code = train.main(command(tmp_path / "run")[2:])
            sys.stdout.flush()
        finally:
            os._exit(code)
    output = b""
    while True:
        try:
            part = os.read(terminal, 2**16)
        except OSError:  # how Linux says that the terminal was closed
            break
        if not part:
            break
        output += part
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, output.decode()[-2000:]
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode()))
    bars = [line for line in lines if re.search(r" \d/8", line)]
    first = next(line for line in bars if "left" in line)
    assert re.fullmatch(rf"epoch 1/2 \S+ 1/8  {FIGURES}", first.strip()), first
    assert any(line.startswith("testing ") for line in bars)
    assert max(map(len, bars)) <= 80


BASE = {"epoch": 100, "train_error": 31.2, "train_loss": 1.23456, "test_error": 30.4, "lr": 0.01}
TIMES = {"images_per_second": 1234.5, "seconds": 1041.2}


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, "test error 30.40 %  train 31.20 %  loss 1.2346  1234 images/s"),
        ({"at_loss": 0.5, "kd_loss": 0.25}, "test error 30.40 %  train 31.20 %  loss 1.2346  AT 0.5000"),
        ({"test_top5_error": 10.8}, "test error 30.40 % (top 5: 10.80 %)  train 31.20 %"),
        ({"train_loss": 1e9, "seconds": 9.0}, "test error 30.40 %  train 31.20 %  loss 1e+09  1234 images/s"),
    ],
)
def test_an_epoch_takes_one_line(keys: dict[str, float], expected: str) -> None:
    line = reporting.epoch_line(BASE | TIMES | keys, 100)
    assert line.startswith(f"epoch 100/100  {expected}")
    assert len(line) <= 80


def test_a_short_epochs_line_says_all() -> None:
    keys = {"epoch": 1, "images_per_second": 99.0, "seconds": 3.0}
    line = reporting.epoch_line(BASE | keys, 9)
    assert line == "epoch 1/9  test error 30.40 %  train 31.20 %  loss 1.2346  99 images/s  3 s"
