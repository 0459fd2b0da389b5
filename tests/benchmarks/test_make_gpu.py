"""`make gpu`: its pieces, and what is left of them wherever it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from runs import wait_until

from benchmarks import __main__ as run
from benchmarks import gpu, report
from benchmarks.pieces import ROOT, SAVE_EVERY_S, Piece, Record, run_missing
from benchmarks.report import Row
from benchmarks.suites import loss as loss_suite


def piece(name: str, code: str, **others: Any) -> Piece:
    return Piece(name, [sys.executable, "-c", code], **others)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record(tmp_path / "results", "sources", tmp_path / "archive.tar.gz")
    made.create()
    return made


# --- running ----------------------------------------------------------------------------------------


def test_pieces_are_run_once_and_their_failures_again(record: Record, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    todo = [
        piece("good", count),
        piece("bad", "print('why'); raise SystemExit(3)"),
        piece("impossible", count, obstacle="no tool"),
        piece("setting", "import os; assert os.environ['A'] == '1'", environment={"A": "1"}),
        Piece("absent", ["no-such-program"]),
    ]
    for _ in range(2):
        states = run_missing(todo, record)
        assert states["good"].startswith("done in ")
        assert states["bad"] == f"failed: exit 3: {record.log(todo[1])}"
        assert states["impossible"] == "skipped: no tool"
        assert states["setting"].startswith("done")
        assert states["absent"].startswith("failed: ")
    assert (tmp_path / "count").read_text() == "x"
    assert record.log(todo[1]).read_text() == "why\n" * 2
    assert set(record.done()) == {"good", "setting"}
    assert Record(record.folder, "other sources").done() == {}


def test_no_piece_starts_after_the_budget(record: Record) -> None:
    now = [0.0]

    class Takes60:
        def wait(self, timeout: float) -> int:
            now[0] += 60
            return 0

        def kill(self) -> None:
            pass

    todo = [piece(name, "") for name in ("first", "second", "third")]
    states = run_missing(todo, record, 100, clock=lambda: now[0], start=lambda piece, log: Takes60())
    assert states == {"first": "done in 60 s", "second": "done in 60 s", "third": "not run"}


def test_the_budget_ends_a_piece_which_is_no_failure(record: Record) -> None:
    told: list[dict[str, str]] = []
    todo = [piece("endless", "import time; time.sleep(60)"), piece("next", "")]
    states = run_missing(todo, record, 1, finished=lambda states: told.append(dict(states)))
    assert states == {"endless": "not done within the budget", "next": "not run"}
    assert told == [{"endless": "not done within the budget"}]


def test_a_piece_is_ended_with_all_it_started(record: Record, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    states = run_missing([piece("endless", code, limit_s=1)], record)
    assert states["endless"].startswith("failed: took more than its time")
    time.sleep(3)
    assert not mark.exists()


def test_a_line_that_a_kill_cut_off_is_no_success(record: Record) -> None:
    done, cut, later = (piece(name, "") for name in ("done", "cut", "later"))
    record.add(done, 1)
    record.add(cut, 1)
    log = record.folder / "done.jsonl"
    log.write_text(log.read_text()[:-20])
    assert set(record.done()) == {"done"}
    record.add(later, 1)
    assert set(record.done()) == {"done", "later"}


def test_an_archive_is_written_in_one_step_and_only_when_something_changed(record: Record) -> None:
    assert record.archive is not None
    (record.folder / "page").write_text("1")
    record.save()
    first = record.archive.stat().st_ino
    record.save()
    assert record.archive.stat().st_ino == first
    (record.folder / "page").write_text("12")
    record.save()
    with tarfile.open(record.archive) as archive:
        assert archive.getnames() == ["page"]
    assert [path.name for path in record.archive.parent.iterdir() if path.is_file()] == ["archive.tar.gz"]

    (record.folder / "page").write_text("newer than the archive")
    record.create()
    assert (record.folder / "page").read_text() == "newer than the archive"
    shutil.rmtree(record.folder)
    record.create()
    assert (record.folder / "page").read_text() == "12"


# --- a machine that may end at any second ---------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Of one cell, as the loss suite measures it."""
    folder = tmp_path_factory.mktemp("rows")
    command = ["--suite", "loss", "--quick", "--cells", "cifar-nchw-fp32", "--providers", "authors"]
    assert run.main([*command, "--out", str(folder)]) == 0
    found: list[Row] = report.read(folder, "loss-cpu")["rows"]
    return found


class Machine:
    """A GPU machine of the imagination: each piece takes all of its time, and each loss piece measures a cell
    every 20 s, which is there when it is begun again. `survives` sees what would be left at every second."""

    def __init__(self, rows: list[Row], survives: Callable[[Machine], object] = lambda machine: None) -> None:
        self.now, self.rows, self.survives = 0.0, rows, survives
        self.ended: dict[str, float] = {}
        self.measured: list[tuple[float, str]] = []

    def clock(self) -> float:
        return self.now

    def start(self, piece: Piece, log: IO[str]) -> Simulated:
        return Simulated(self, piece)


class Simulated:
    def __init__(self, machine: Machine, piece: Piece) -> None:
        self.machine, self.piece = machine, piece
        self.end = machine.now + piece.limit_s - 1
        self.next_cell = machine.now + 20

    def wait(self, timeout: float) -> int:
        machine, until = self.machine, self.machine.now + timeout
        while machine.now < until:
            machine.now += 1
            if machine.now >= self.next_cell and "loss" in self.piece.command:
                self.measure()
            machine.survives(machine)
            if machine.now >= self.end:
                machine.ended[self.piece.name] = machine.now
                return 0
        raise subprocess.TimeoutExpired("simulated", timeout)

    def measure(self) -> None:
        command = list(self.piece.command)
        folder = Path(command[command.index("--out") + 1])
        there = report.read(folder, "loss-cuda").get("rows", [])
        cell = f"{self.piece.name}-{len(there)}"
        found = [row | {"cell": cell, "timing": "graph"} for row in self.machine.rows]
        rows = [*there, *found]
        loss_suite.page(rows, draws=False).write(folder, "loss-cuda", rows, {"gpu": "imagined"})
        self.machine.measured.append((self.machine.now, cell))
        self.next_cell += 20

    def kill(self) -> None:
        pass


def contents(archive: Path, folder: Path, todo: list[Piece]) -> tuple[set[str], set[str], str]:
    """What an archive holds: the pieces that are done, the cells measured, and the summary's text."""
    shutil.rmtree(folder, ignore_errors=True)
    record = Record(folder, "sources", archive)
    record.create()
    cells, _ = gpu.loss_rows(folder / "pieces/sources", todo, "cuda")
    summary = folder / "summary.md"
    return set(record.done()), {row["cell"] for row in cells}, summary.read_text() if summary.exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize("has_library", [True, False], ids=["brought along", "to be built"])
def test_a_kill_at_any_second_costs_the_piece_in_flight_at_most(
    has_library: bool, rows: list[Row], tmp_path: Path
) -> None:
    results, archive = tmp_path / "results", tmp_path / "out/archive.tar.gz"
    archive.parent.mkdir()
    measured = results / "pieces/sources"
    todo = gpu.pieces(measured, "cuda", False, None, has_library)
    known: dict[int, tuple[set[str], set[str], str]] = {}  # of each state of the archive

    def survives(machine: Machine) -> None:
        assert len(list(archive.parent.iterdir())) <= 1, "one file leaves the machine"
        if not archive.exists():
            assert machine.now <= 20 + SAVE_EVERY_S + 1
            return
        state = archive.stat().st_mtime_ns
        if state not in known:
            known[state] = contents(archive, tmp_path / "survivor", todo)
        done, cells, summary = known[state]
        assert done == set(machine.ended)
        assert cells >= {cell for at, cell in machine.measured if at <= machine.now - SAVE_EVERY_S - 1}
        if machine.now >= 119:
            assert any(cell.startswith("loss-first") for cell in cells)
            assert "| loss-first-" in summary
            assert "-0 | " in summary, "the line of its first cell"

    def call(machine: Machine, budget: float) -> dict[str, str]:
        record = Record(results, "sources", archive)
        record.create()
        measured.mkdir(parents=True, exist_ok=True)
        return run_missing(
            todo,
            record,
            budget,
            clock=machine.clock,
            start=machine.start,
            finished=lambda states: gpu.summarize(results, measured, todo, "cuda", states),
        )

    machine = Machine(rows, survives)
    states = call(machine, 900)
    first = "loss-first-cuda" if has_library else "loss-first-triton"
    assert machine.ended[first] < 60
    assert len(known) > 10
    interrupted = [name for name, state in states.items() if state == "not done within the budget"]
    assert len(interrupted) == 1
    assert machine.now == 900

    # On another machine, which gets the archive alone, the cells of the interrupted piece are still there.
    before = contents(archive, tmp_path / "survivor", todo)
    shutil.rmtree(results)
    machine.survives = lambda machine: None
    states = call(machine, 20000)
    assert all(state.startswith(("done", "skipped")) for state in states.values())
    after = contents(archive, tmp_path / "survivor", todo)
    assert before[1] < after[1]
    assert len(machine.measured) == len(after[1]), "no cell was measured twice"


def test_after_a_real_kill_cells_are_there(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from benchmarks import pieces\n"
        "pieces.SAVE_EVERY_S = 0.2\n"
        f"folder = Path({str(tmp_path / 'results')!r})\n"
        f"record = pieces.Record(folder, 'sources', Path({str(tmp_path / 'archive.tar.gz')!r}))\n"
        "record.create()\n"
        "cell = f\"import time; open({str(folder / 'cell')!r}, 'w').write('measured'); time.sleep(5)\"\n"
        "programs = {'quick': '', 'cells': cell}\n"
        "todo = [pieces.Piece(name, [sys.executable, '-c', code]) for name, code in programs.items()]\n"
        "pieces.run_missing(todo, record)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    archive = tmp_path / "archive.tar.gz"

    def names() -> list[str]:
        if not archive.exists():
            return []
        with tarfile.open(archive) as opened:
            return opened.getnames()

    wait_until(lambda: "cell" in names(), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    survivor = Record(tmp_path / "survivor", "sources", archive)
    survivor.create()
    assert set(survivor.done()) == {"quick"}
    assert (survivor.folder / "cell").read_text() == "measured"


@pytest.mark.slow
@pytest.mark.parametrize("suite, choice", [("loss", ["--cells", "cifar"]), ("scaling", [])])
def test_cells_that_are_there_are_not_measured_again(
    suite: str, choice: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    measure = loss_suite.measure_cell

    def until_killed(cell: Any, *arguments: Any, **options: Any) -> list[Row]:
        if len(measured) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        measured.append(cell.name)
        return measure(cell, *arguments, **options)

    monkeypatch.setattr(loss_suite, "measure_cell", until_killed)
    command = ["--suite", suite, "--quick", "--providers", "authors", "--out", str(tmp_path), *choice]
    with pytest.raises(KeyboardInterrupt):
        run.main([*command, "--resume"])
    (tmp_path / "again").touch()
    assert run.main([*command, "--resume"]) == 0
    assert len(measured) == len(set(measured)) == 4
    assert (
        list(dict.fromkeys(row["cell"] for row in report.read(tmp_path, f"{suite}-cpu")["rows"])) == measured
    )
    assert run.main([*command, "--resume"]) == 0
    assert len(measured) == 4
    assert run.main(command) == 0
    assert len(measured) == 8, "without --resume all are measured"


# --- the pieces -----------------------------------------------------------------------------------------


def names_of(tmp_path: Path, has_library: bool = True) -> list[str]:
    return [piece.name for piece in gpu.pieces(tmp_path, "cuda", False, None, has_library)]


def test_what_matters_most_comes_first(tmp_path: Path) -> None:
    names = names_of(tmp_path)
    assert names[:3] == ["loss-first-cuda", "test-cuda_device", "loss-first-triton"]
    assert "build" not in names
    assert names_of(tmp_path, has_library=False)[:4] == [
        "loss-first-triton",
        "build",
        "loss-first-cuda",
        "test-cuda_device",
    ]
    assert len(set(names)) == len(names)
    suites = {"step", "trainer", "memory", "scaling", "hot-cells", "loss-imagenet"}
    assert {"memcheck", "racecheck"} | suites <= set(names)


def test_of_tests_for_every_backend_those_of_the_gpu_are_pieces(tmp_path: Path) -> None:
    tests = [p for p in gpu.pieces(tmp_path, "cuda", False, None, True) if p.name.startswith("test-")]
    for tested in tests:
        files = [ROOT / word for word in tested.command if word.startswith("tests/")]
        assert files
        assert all(file.exists() for file in files)
        if any("@each_backend" in file.read_text() for file in files):
            assert tested.command[tested.command.index("-k") + 1] in ("cuda", "triton", "cuda or triton")


def test_commands_of_the_pieces_are_understood(tmp_path: Path) -> None:
    commands = [list(p.command) for p in gpu.pieces(tmp_path, "cuda", True, tmp_path, True)]
    options = [run.arguments(c[c.index("benchmarks") + 1 :]) for c in commands if "--suite" in c]
    assert [option.cifar for option in options if option.suite == "trainer"] == [tmp_path]
    assert all(option.resume for option in options if option.suite in ("loss", "scaling"))
    first = options[0]
    assert (first.workloads, first.modes, first.timings) == (["imagenet", "cifar"], ["both"], ["graph"])
    assert first.providers == ["ours-cuda", "ours-cuda-two-pass", "authors-autocast"]


def test_without_what_the_trainer_needs_the_library_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "pydantic" else find(name)
    )
    skipped = {
        p.name
        for p in gpu.pieces(tmp_path, "cpu", True, None, True)
        if p.obstacle == "pydantic is not installed"
    }
    assert skipped == {"trainer", "test-trainer"}


def test_wheels_that_were_brought_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "before")
    with pytest.raises(ValueError, match=r"--wheels .*: no \*\.whl there"):
        gpu.unpack_wheels(tmp_path, tmp_path / "site")
    with zipfile.ZipFile(tmp_path / "brought_along-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along/__init__.py", "value = 3")
    gpu.unpack_wheels(tmp_path, tmp_path / "site")
    assert __import__("brought_along").value == 3
    child = subprocess.check_output(
        [sys.executable, "-c", "import brought_along; print(brought_along.value)"]
    )
    assert child == b"3\n"
    assert os.environ["PYTHONPATH"].endswith("before")


def test_a_library_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import setup

    library = tmp_path / "at_fused/_cuda.so"
    library.parent.mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert not gpu.has_library()
    library.write_bytes(b"ELF" + bytes.fromhex(setup.build_id(gpu.architecture())) + b"...")
    assert gpu.has_library()
    library.write_bytes(b"ELF" + bytes.fromhex(setup.build_id("8.0")) + b"...")
    assert not gpu.has_library()


# --- command line ---------------------------------------------------------------------------------------


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "source_digest", lambda: "sources")
    monkeypatch.setattr(signal, "signal", lambda *handler: None)


@pytest.mark.usefixtures("sources")
def test_list_and_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(tmp_path, "sources")
    record.add(piece("step", ""), 12)
    Record(tmp_path, "others").add(piece("memory", ""), 12)
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
    assert "no piece 'nothing'; there are: loss-first" in capsys.readouterr().err


def test_without_a_gpu_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "gpu: this machine has no CUDA device that torch can use\n"
    assert not any(tmp_path.iterdir())


def test_a_folder_for_results_that_cannot_be(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert gpu.main(["--results", str(tmp_path / "file"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"gpu: --results {tmp_path / 'file'}: Not a directory\n"


@pytest.mark.usefixtures("sources")
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
    assert gpu.main(["--results", str(tmp_path), "--device", "cpu"]) == code
    summary = (tmp_path / "summary.md").read_text()
    for name, state in zip(("first", "second"), states, strict=True):
        assert f"| {name} | {state} " in summary


@pytest.mark.usefixtures("sources")
def test_summary_joins_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they were finished or not; of a cell that two have measured, the later piece's rows count."""
    todo = [piece(name, "") for name in ("first", "fp32", "bf16")]
    monkeypatch.setattr(gpu, "pieces", lambda *options: todo)
    measured = tmp_path / "pieces/sources"
    for name, dtype in (("first", "bf16"), ("fp32", "fp32"), ("bf16", "bf16")):
        command = ["--suite", "loss", "--quick", "--cells", f"cifar-nchw-{dtype}", "--providers", "authors"]
        assert run.main([*command, "--out", str(measured / name)]) == 0
    (tmp_path / "pieces/others/fp32").mkdir(parents=True)
    (tmp_path / "pieces/others/fp32/loss-cpu.json").write_text("not read")
    Record(tmp_path, "sources").add(todo[1], 2)
    assert gpu.main(["--results", str(tmp_path), "--device", "cpu", "--summarize"]) == 0
    rows = report.read(tmp_path, "loss-cpu")["rows"]
    assert [row["cell"] for row in rows] == ["cifar-nchw-bf16", "cifar-nchw-fp32"]
    assert rows[0] == report.read(measured / "bf16", "loss-cpu")["rows"][0]
    assert (tmp_path / "loss-cpu.png").exists()
    summary = (tmp_path / "summary.md").read_text()
    assert "| first | not run |" in summary
    assert "| fp32 | done in 2 s |" in summary


def test_a_page_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write(tmp_path, "page", "old", [{"a": 1}], {})
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        report.write(tmp_path, "page", "new", [{"a": 2}], {})
    after = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert after == before
    assert json.loads(after["page.json"]) == {"rows": [{"a": 1}]}
