"""The benchmark's path on a GPU, with stand-ins for the device."""

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as run
from benchmarks.loss import providers
from benchmarks.loss import tables as loss_tables
from benchmarks.loss.workloads import Cell, select_cells
from benchmarks.measure import counters, timing
from benchmarks.suites import loss as loss_suite

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
def test_graphs_alone_start_no_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds to start, and not every machine lets it."""
    monkeypatch.setattr(counters, "profile", None)
    (cell,) = select_cells("cifar-nchw-fp32", batch=2)
    found = [providers.Provider("authors", providers.authors)]
    (row,) = loss_suite.measure_cell(cell, found, torch.device("cuda"), 1, timings=["graph"])
    assert (row["timing"], row["launches"], row["peak_extra_bytes"]) == ("graph", None, None)
    assert 0 < row["error"] < 1e-5


@pytest.mark.usefixtures("fake_cuda")
def test_events_give_seconds() -> None:
    assert 0.01 <= timing.stopwatch(torch.device("cuda"))(lambda: time.sleep(0.01)) < 5


class Writes(TorchDispatchMode):
    """The bytes of the tensors that an operator alters or hands back."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes += result.nbytes
        return result


@pytest.mark.usefixtures("fake_cuda")
def test_the_cache_is_emptied_by_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written stays in the cache, and is written back while the next contender is timed."""
    read: list[int] = []
    summed = torch.sum
    monkeypatch.setattr(torch, "sum", lambda x, *a, **k: read.append(x.nbytes) or summed(x, *a, **k))
    evict = timing.evictor(torch.device("cuda"))
    with Writes() as written:
        evict()
    assert read == [timing.L2_BYTES]
    assert written.bytes <= 4


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
