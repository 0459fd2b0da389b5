"""The benchmark's path on a GPU, with stand-ins for the device, and the pieces of `make gpu`."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import counters, gpu, loss_suite, loss_tables, providers, run, timing
from benchmarks.workloads import Cell, select_cells

CPU = torch.device("cpu")

# --- suites on a device that only says it is one -----------------------------------------------------


class CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: CPU if key == "device" else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "FakeEvent") -> float:
        return (other.time - self.time) * 1e3


class FakeStream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: "FakeStream") -> None:
        pass


class FakeGraph:
    def replay(self) -> None:
        time.sleep(1e-4)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device: "no GPU",
        "Event": FakeEvent,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": lambda graph, stream: nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    make = Cell.make
    monkeypatch.setattr(Cell, "make", lambda cell, device: make(cell, CPU))
    monkeypatch.setitem(loss_suite.COPY_BYTES, "cuda", 2**20)
    monkeypatch.setattr(timing, "L2_BYTES", 2**10)
    with CudaMeansCpu():
        yield


@pytest.mark.usefixtures("fake_cuda")
def test_graphs_and_calls_are_timed_apart(tmp_path: Path) -> None:
    command = ["--suite", "loss", "--quick", "--device", "cuda", "--out", str(tmp_path)]
    chosen = ["--workloads", "cifar", "--layouts", "nchw", "--providers", "authors", "authors-autocast"]
    assert run.main([*command, *chosen]) == 0
    result = json.loads((tmp_path / "loss-cuda.json").read_text())
    assert result["machine"]["gpu"] == "no GPU"
    measured = [(row["timing"], row["mode"], row["provider"]) for row in result["rows"]]
    assert measured == [
        (kind, mode, provider)
        for kind, mode in [
            ("eager", "forward"),
            ("eager", "backward"),
            ("eager", "both"),
            ("graph", "forward"),
            ("graph", "both"),
        ]
        for provider in ("authors", "authors-autocast")
    ]
    assert {row["dtype"] for row in result["rows"]} == {"bf16"}
    both = [row for row in result["rows"] if row["mode"] == "both" and row["provider"] == "authors"]
    overhead = loss_tables.host_overhead_us(both[0], result["rows"])
    assert overhead == pytest.approx((both[0]["median_ms"] - both[1]["median_ms"]) * 1e3)


@pytest.mark.usefixtures("fake_cuda")
def test_events_give_seconds() -> None:
    assert 0.01 <= timing.stopwatch(torch.device("cuda"))(lambda: time.sleep(0.01)) < 5


@pytest.mark.usefixtures("fake_cuda")
def test_what_cannot_be_captured_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(graph: object, stream: object) -> object:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    (cell,) = select_cells("cifar-nchw-fp32", batch=2)
    found = [providers.Provider("authors", providers.authors)]
    rows = loss_suite.measure_cell(cell, found, torch.device("cuda"), 1, timings=["eager", "graph"])
    assert [row["timing"] for row in rows] == ["eager"]
    assert "authors can't be captured: operation not permitted" in capsys.readouterr().err


def test_launches_are_the_events_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Profile:
        def __init__(self, activities: object) -> None:
            pass

        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def events(self) -> list[Any]:
            kinds = [torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU]
            return [type("Event", (), {"device_type": kind}) for kind in (*kinds, kinds[0])]

    monkeypatch.setattr(counters, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert counters.launches(lambda: None, torch.device("cuda")) == 2


# --- pieces ----------------------------------------------------------------------------------


def piece(name: str, code: str, **others: Any) -> gpu.Piece:
    return gpu.Piece(name, [sys.executable, "-c", code], **others)


@pytest.fixture
def record(tmp_path: Path) -> gpu.Record:
    made = gpu.Record(tmp_path)
    made.create()
    return made


def test_pieces_are_run_once_and_their_failures_again(record: gpu.Record, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    todo = [
        piece("good", count),
        piece("bad", "print('why'); raise SystemExit(3)"),
        piece("impossible", count, obstacle="no tool"),
        piece("setting", "import os; assert os.environ['A'] == '1'", environment={"A": "1"}),
        gpu.Piece("absent", ["no-such-program"]),
    ]
    for _ in range(2):
        states = gpu.run_missing(todo, record, None)
        assert states["good"].startswith("done in ")
        assert states["bad"] == f"failed: exit 3: {tmp_path / 'logs' / 'bad.log'}"
        assert states["impossible"] == "skipped: no tool"
        assert states["setting"].startswith("done")
        assert states["absent"].startswith("failed: ")
    assert (tmp_path / "count").read_text() == "x"
    assert (tmp_path / "logs" / "bad.log").read_text() == "why\n"
    assert sorted(path.name for path in (tmp_path / "stamps").iterdir()) == ["good", "setting"]


def test_no_piece_starts_after_the_budget(record: gpu.Record) -> None:
    now = iter([0.0, 0.0, 50.0, 100.0])
    todo = [piece(name, "") for name in ("first", "second", "third")]
    states = gpu.run_missing(todo, record, 100, clock=lambda: next(now))
    assert [state.split()[0] for state in states.values()] == ["done", "done", "not"]


def test_the_budget_ends_a_piece_which_is_no_failure(record: gpu.Record) -> None:
    told: list[dict[str, str]] = []
    todo = [piece("endless", "import time; time.sleep(60)"), piece("next", "")]
    states = gpu.run_missing(todo, record, 1, finished=lambda states: told.append(dict(states)))
    assert states == {"endless": "not done within the budget", "next": "not run"}
    assert told == [{"endless": "not done within the budget"}]


def test_a_piece_is_ended_with_all_it_started(record: gpu.Record, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    states = gpu.run_missing([piece("endless", code)], record, None, limit_s=1)
    assert states["endless"].startswith("failed: took more than 1 s")
    time.sleep(3)
    assert not mark.exists()


def test_every_test_and_suite_is_a_piece(tmp_path: Path) -> None:
    names = [p.name for p in gpu.pieces(tmp_path, "cuda", quick=False)]
    assert names[0] == "build"
    assert len(set(names)) == len(names)
    files = {path.stem[5:] for path in Path(__file__).parent.glob("test_*.py")}
    assert {name[5:] for name in names if name.startswith("test-")} == files
    suites = {"step", "trainer", "memory", "scaling", "hot-cells", "loss-imagenet"}
    assert {"memcheck", "racecheck"} | suites <= set(names)


def test_without_what_the_trainer_needs_the_library_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_trainer_lacks", lambda: "pydantic is not installed")
    found = {p.name for p in gpu.pieces(tmp_path, "cpu", quick=True) if p.obstacle is None}
    assert found.isdisjoint({"test-trainer", "test-recipes", "test-kills", "test-two_nodes", "trainer"})
    assert {"test-attention_loss", "test-hints", "test-taps", "step"} <= found


def test_commands_of_the_pieces_are_understood(tmp_path: Path) -> None:
    commands = [list(p.command) for p in gpu.pieces(tmp_path, "cuda", quick=True, cifar=tmp_path)]
    options = [run.arguments(c[c.index("benchmarks.run") + 1 :]) for c in commands if "benchmarks.run" in c]
    assert [option.cifar for option in options if option.suite == "trainer"] == [tmp_path]


def test_list_and_dry_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "stamps").mkdir()
    (tmp_path / "stamps" / "step").write_text(f"12 {gpu.source_digest()}\n")
    (tmp_path / "stamps" / "memory").write_text("12 0123456789abcdef\n")  # of other sources
    command = ["--results", str(tmp_path), "--only", "step", "memory"]
    assert gpu.main([*command, "--list"]) == 0
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "done in 12 s",
        "not run",
    ]
    assert gpu.main([*command, "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "--suite memory" in line
    absent = tmp_path / "absent"
    assert gpu.main(["--results", str(absent), "--only", "step", "--list"]) == 0
    assert capsys.readouterr().out.split(maxsplit=1)[1] == "not run\n"
    assert not absent.exists()
    assert gpu.main(["--results", str(tmp_path), "--only", "nothing"]) == 2
    assert "no piece 'nothing'; there are: build" in capsys.readouterr().err


def test_without_a_gpu_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "gpu: this machine has no CUDA device that torch can use\n"
    assert not any(tmp_path.iterdir())


def test_a_folder_for_results_that_cannot_be(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert gpu.main(["--results", str(tmp_path / "file"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"gpu: --results {tmp_path / 'file'}: Not a directory\n"


@pytest.mark.parametrize(
    "codes, code, states",
    [
        ([0, 0], 0, ["done", "done"]),
        ([3, 0], 1, ["failed:", "done"]),
        ([0, 3], 1, ["done", "failed:"]),
        ([0, None], 0, ["done", "skipped:"]),
    ],
)
def test_a_piece_that_fails_ends_in_1(
    codes: list[int | None], code: int, states: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all others have run; one that can't run here is no failure."""
    todo = [
        piece(name, f"raise SystemExit({ends})", obstacle="no tool" if ends is None else None)
        for name, ends in zip(("first", "second"), codes, strict=True)
    ]
    monkeypatch.setattr(gpu, "pieces", lambda *options: todo)
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    assert gpu.main(["--results", str(tmp_path), "--device", "cpu"]) == code
    summary = (tmp_path / "summary.md").read_text()
    for name, state in zip(("first", "second"), states, strict=True):
        assert f"| {name} | {state} " in summary


def test_summary_joins_the_pieces(tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        command = ["--suite", "loss", "--quick", "--cells", f"cifar-nchw-{dtype}", "--providers", "authors"]
        assert run.main([*command, "--out", str(tmp_path / "pieces" / dtype)]) == 0
    states = {"build": "done in 1 s", "fp32": "done in 2 s", "bf16": "done in 2 s"}
    (tmp_path / "pieces/old").mkdir()  # of other sources
    (tmp_path / "pieces/old/loss-cpu.json").write_text("not read")
    gpu.summarize(tmp_path, "cpu", states | {"old": "not run"})
    rows = json.loads((tmp_path / "loss-cpu.json").read_text())["rows"]
    assert [row["cell"] for row in rows] == ["cifar-nchw-bf16", "cifar-nchw-fp32"]
    assert (tmp_path / "loss-cpu.png").exists()
    assert "| build | done in 1 s |" in (tmp_path / "summary.md").read_text()
