"""The benchmark counts bytes, memory and times right, compares like with like, writes what it measured."""

import csv
import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import at_fused
import models
from at_fused import backends
from benchmarks import __main__ as run
from benchmarks import issue, predictions, report
from benchmarks.loss import providers
from benchmarks.loss import tables as loss_tables
from benchmarks.loss.subjects import Subject, check_agreement, subjects, tolerance
from benchmarks.loss.workloads import WORKLOADS, Cell, select_cells, sweep_cells
from benchmarks.measure import counters, timing
from benchmarks.suites import step as step_suite
from benchmarks.suites import step_probe
from benchmarks.suites import teacher as teacher_suite
from trainer import loop
from trainer.run import Run

CPU = torch.device("cpu")
PROVIDERS = providers.providers(CPU)
needs_cpu_backend = pytest.mark.skipif("ours-cpu" not in PROVIDERS, reason="the CPU kernel was not built")


# --- workloads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_type, name, student, teacher",
    [
        # (16*32*32 + 32*16*16 + 64*8*8) * 128 * 4 bytes, and twice the channels
        ("cpu", "cifar-nchw-fp32", 14_680_064, 29_360_128),
        ("cuda", "cifar-channels_last-bf16", 7_340_032, 14_680_064),
        # two blocks per group
        ("cuda", "cifar-blocks-nchw-bf16", 14_680_064, 29_360_128),
        ("cuda", "cifar40-nchw-bf16", 14_680_064, 14_680_064),
        ("cuda", "cifar40-blocks-nchw-bf16", 29_360_128, 29_360_128),
        # (64*56*56 + 128*28*28 + 256*14*14 + 512*7*7) * 32 * 4 bytes on both sides
        ("cpu", "imagenet-channels_last-fp32", 48_168_960, 48_168_960),
        ("cpu", "imagenet-nchw-bf16", 24_084_480, 24_084_480),
        # 376,320 elements * 256 * 2 bytes; four times the channels in ResNet-50
        ("cuda", "imagenet-nchw-bf16", 192_675_840, 192_675_840),
        ("cuda", "imagenet50-nchw-bf16", 192_675_840, 770_703_360),
        # (256*14*14 + 512*7*7) * 256 * 2
        ("cuda", "imagenet-last2-nchw-bf16", 38_535_168, 38_535_168),
        ("cuda", "imagenet50-last2-nchw-bf16", 38_535_168, 154_140_672),
        # 4 * 197 * (192, 384) * 256 * 2
        ("cuda", "vit-channels_last-bf16", 77_463_552, 154_927_104),
    ],
)
def test_bytes_of_a_cell(device_type: str, name: str, student: int, teacher: int) -> None:
    cells = select_cells(device_type=device_type, dtypes=("fp32", "bf16"))
    (cell,) = [cell for cell in cells if cell.name == name]
    assert (cell.student_bytes, cell.teacher_bytes) == (student, teacher)
    assert cell.bytes_moved() == cell.bytes_moved("both") == 3 * student + teacher
    assert cell.bytes_moved("forward") == student + teacher
    assert cell.bytes_moved("backward") == 2 * student
    assert cell.bytes_moved(one_pass=True) == 2 * student + teacher
    for one_pass in (False, True):
        parts = (cell.bytes_moved(mode, one_pass) for mode in ("forward", "backward"))
        assert sum(parts) == cell.bytes_moved("both", one_pass)


@pytest.mark.parametrize(
    "workload, student, teacher, taps, size",
    [
        ("cifar", "wrn-16-1", "wrn-16-2", "groups", 32),
        ("cifar-blocks", "wrn-16-1", "wrn-16-2", "blocks", 32),
        ("cifar40", "wrn-16-2", "wrn-40-2", "groups", 32),
        ("imagenet", "resnet-18", "resnet-34", "groups", 224),
        ("imagenet50", "resnet-18", "resnet-50", "groups", 224),
    ],
)
def test_shapes_are_those_of_the_models(
    workload: str, student: str, teacher: str, taps: str, size: int
) -> None:
    def shapes(name: str) -> tuple[tuple[int, ...], ...]:
        model = models.create(name).to("meta").eval()
        with at_fused.FeatureTaps(model, model.taps[taps]) as features:
            model(torch.empty(1, 3, size, size, device="meta"))
            return tuple(tuple(feature.shape[1:]) for feature in features.features)

    assert WORKLOADS[workload].student == shapes(student)
    assert WORKLOADS[workload].teacher == shapes(teacher)


def test_partial_workloads() -> None:
    for name in ("imagenet", "imagenet50"):
        assert WORKLOADS[f"{name}-last2"].student == WORKLOADS[name].student[2:]
        assert WORKLOADS[f"{name}-last2"].teacher == WORKLOADS[name].teacher[2:]
    # every third of the 18 blocks of WRN-40-2 has the shape of the same block of WRN-16-2
    assert set(WORKLOADS["cifar40-blocks"].student) == set(WORKLOADS["cifar40"].student)
    assert len(WORKLOADS["cifar40-blocks"].teacher) == 6


ALL_CELLS = select_cells(batch=2, workloads=list(WORKLOADS), dtypes=("bf16",)) + select_cells(batch=2)


@pytest.mark.parametrize("cell", ALL_CELLS, ids=lambda cell: cell.name)
def test_features_are_what_the_cell_says(cell: Cell) -> None:
    students, teachers = cell.make(CPU)
    assert sum(s.numel() * s.element_size() for s in students) == cell.student_bytes
    assert sum(t.numel() * t.element_size() for t in teachers) == cell.teacher_bytes
    assert all(s.requires_grad and s.is_leaf for s in students)
    assert not any(t.requires_grad for t in teachers)
    channel_strides = {feature.stride(1) == 1 for feature in (*students, *teachers)}
    assert channel_strides == {cell.layout == "channels_last"}


def test_selection_of_cells() -> None:
    assert len({cell.name for cell in select_cells()}) == 8  # the quick default
    assert {cell.batch for cell in select_cells()} == {128, 32}
    cuda = select_cells(device_type="cuda", powers=(2, 4))
    assert len({cell.name for cell in cuda}) == len(cuda) == 2 * (9 * 2 + 1)
    assert sum(cell.name.endswith("-p4") for cell in cuda) == 19
    assert {cell.batch for cell in cuda if cell.workload.startswith("imagenet")} == {256}
    with pytest.raises(ValueError, match="cifar-nchw-fp32"):
        select_cells("no such cell")
    with pytest.raises(ValueError, match="none of these layouts"):
        select_cells(workloads=["vit"], layouts=["nchw"])


def test_sweeps_vary_one_thing() -> None:
    sweeps = sweep_cells("cpu", "nchw", "fp32")
    assert [cell.batch for cell in sweeps["batch"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert {cell.student for cell in sweeps["batch"]} == {((128, 28, 28),)}
    assert [cell.student[0][0] for cell in sweeps["channels"]] == [16, 32, 64, 128, 256, 512, 1024]
    assert {cell.batch for cell in sweeps["channels"]} == {32}


# --- providers --------------------------------------------------------------------------------------


def pick(name: str, **options: object) -> Cell:
    (cell,) = select_cells(name, batch=2, **options)  # type: ignore[arg-type]
    return cell


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["cifar-nchw", "vit-channels_last"])
def test_providers_agree(name: str, dtype: str, p: int) -> None:
    cell = pick(name, workloads=["cifar", "vit"], dtypes=[dtype], powers=[p])
    eager = [provider for provider in PROVIDERS.values() if not provider.compiled]
    found = subjects(cell, eager, CPU)
    assert all(student.grad is None for student in found[0].students)
    assert {"authors", "vecdot"} <= {subject.provider.name for subject in found}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s, t, p: 1.01 * providers.authors(s, t, p),
        lambda s, t, p: torch.nan * providers.authors(s, t, p),
        lambda s, t, p: providers.authors(s, t, p).detach() + 0 * s[0].sum(),
        lambda s, t, p: providers.authors(s, t, p) + (0 * s[-1].sum()).sqrt(),  # NaN in one gradient
        lambda s, t, p: providers.authors(s, t, 1),
    ],
)
def test_wrong_values_are_not_timed(wrong) -> None:
    cell = pick("cifar-nchw-fp32")
    features = cell.make(CPU)
    right = Subject(providers.Provider("right", providers.authors), cell, *features)
    check_agreement([right])
    with pytest.raises(RuntimeError, match=r"cifar-nchw-fp32: wrong (is off|gives no gradient)"):
        check_agreement([right, Subject(providers.Provider("wrong", wrong), cell, *features)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_ours_may_be_off_is_what_roundings_explain(dtype: str) -> None:
    cell = pick("cifar-nchw", workloads=["cifar"], dtypes=[dtype])
    ours = [provider for provider in PROVIDERS.values() if provider.backend]
    assert ours
    for subject in subjects(cell, ours, CPU):
        assert 0 < subject.error <= tolerance(subject.provider, cell)

    def off(students: Sequence[Tensor], teachers: Sequence[Tensor], p: int) -> Tensor:
        return at_fused.attention_loss(students, teachers, p) * (1 + 2**-7)

    wrong = dataclasses.replace(ours[0], loss=off)
    with pytest.raises(RuntimeError, match=r"is off by 0\.00(78|8) of the value"):
        subjects(cell, [wrong], CPU)


def test_autocast_runs_the_authors_form(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = pick("cifar-nchw-bf16")
    provider = providers.Provider("authors-autocast", providers.under_autocast)
    assert provider.fits(cell)
    assert not provider.fits(pick("cifar-nchw-fp32"))
    check_agreement([Subject(provider, cell, *cell.make(CPU))])

    active: list[torch.dtype | None] = []

    def authors(*features: object) -> torch.Tensor:
        active.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return torch.zeros(())

    monkeypatch.setattr(providers, "authors", authors)
    provider.make(cell)(*cell.make(CPU))
    assert active == [torch.bfloat16]


@needs_cpu_backend
def test_each_form_runs_the_way_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass: gradients come with the loss. Two passes: a backward kernel, whoever ran before."""
    backend = backends.modules["cpu"]
    calls: list[str] = []

    def record(name: str) -> None:
        kernel = getattr(backend, name)

        def recording(*arguments: object, **options: object) -> object:
            calls.append(name)
            return kernel(*arguments, **options)

        monkeypatch.setattr(backend, name, recording)

    record("attention_loss")
    record("attention_maps_backward")
    for dtype, provider, one_pass in [
        ("fp32", "ours-cpu", True),
        ("fp32", "ours-cpu-two-pass", False),
        ("fp16", "ours-cpu", False),
    ]:
        cell = pick(f"cifar-nchw-{dtype}", dtypes=["fp32", "fp16"])
        subject = Subject(PROVIDERS[provider], cell, *cell.make(CPU))
        assert subject.one_pass == one_pass
        for before in (1.0, 2.0):
            student = torch.ones(1, 1, 2, 2, requires_grad=True)
            (before * at_fused.attention_loss(student, torch.ones(1, 1, 2, 2))).backward()
            subject.prepare()
            calls.clear()
            subject.both()
            assert calls == ["attention_loss", "attention_maps_backward"][: 1 if one_pass else 2]


@needs_cpu_backend
def test_no_form_is_measured_twice() -> None:
    fp16 = pick("cifar-nchw-fp16", dtypes=["fp16"])
    assert not PROVIDERS["ours-cpu-two-pass"].fits(fp16)  # the loss scale makes it what ours-cpu is
    assert PROVIDERS["ours-cpu-two-pass"].fits(pick("cifar-nchw-fp32"))


def test_every_backend_takes_part() -> None:
    def serves(backend: str) -> bool:
        try:
            return at_fused.attention_map(torch.ones(1, 1, 2, 2), backend=backend).numel() == 4
        except ValueError:
            return False

    expected = [f"ours-{name}" for name in at_fused.available_backends() if serves(name)]
    found = [name for name in PROVIDERS if name.startswith("ours") and not name.endswith("two-pass")]
    assert found == expected[:-1]  # the reference is no contender
    chosen = [provider.name for provider in providers.select_providers(["vecdot", "ours"], CPU)]
    assert chosen == ["vecdot", *(name for name in PROVIDERS if name.startswith("ours"))]
    with pytest.raises(ValueError, match="no provider 'mine' on cpu; there are: authors, vecdot"):
        providers.select_providers(["mine"], CPU)


# --- counters and times -----------------------------------------------------------------------------


def test_peak_extra_memory_is_exact() -> None:
    kept = []

    def call() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first  # 1500 was the peak
        kept.append(torch.empty(300, dtype=torch.uint8))
        del second

    assert counters.peak_extra_bytes(call, CPU) == 1500 - 300
    assert counters.peak_extra_bytes(kept.clear, CPU) == 300  # held at first, let go of
    assert counters.launches(call, CPU) is None


@needs_cpu_backend
def test_peak_of_each_form() -> None:
    """Ours holds the student's map slopes in fp32 and the loss; nothing as big as an activation."""
    cell = pick("cifar-nchw-bf16")
    for subject in subjects(cell, [PROVIDERS["ours-cpu"], PROVIDERS["ours-cpu-two-pass"]], CPU):
        maps = 4 * 2 * (32 * 32 + 16 * 16 + 8 * 8)
        assert subject.counted(counters.peak_extra_bytes) == maps + 4
        assert predictions.held_bytes(cell) == maps
    (eager,) = subjects(cell, [PROVIDERS["authors"]], CPU)
    peak = eager.counted(counters.peak_extra_bytes)
    assert peak is not None
    assert peak > cell.student_bytes  # the squares


def test_percentiles() -> None:
    times = timing.Times((4.0, 1.0, 3.0, 2.0, 5.0))
    assert times.median == 3.0
    assert times.percentile(20) == pytest.approx(1.8)
    assert times.percentile(80) == pytest.approx(4.2)
    assert timing.percentile([7.0], 20) == 7.0


def test_contenders_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    contenders = [
        timing.Contender(name, lambda name=name: calls.append(name), lambda: calls.append("prepare"))
        for name in "abc"
    ]
    times = timing.interleave(contenders, rounds=20, device=CPU, warmup=2)
    assert calls[::2] == ["prepare"] * 66
    turns = calls[1::2]
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) > 3
    assert {name: len(entry.seconds) for name, entry in times.items()} == dict.fromkeys("abc", 20)


def test_copy_reads_and_writes_half_each() -> None:
    contender = timing.copy(4096, CPU)
    target = contender.run()
    assert isinstance(target, torch.Tensor)
    assert target.nbytes == 2048
    assert bool((target == 1).all())


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_modes_time_their_part_only(mode: str) -> None:
    calls: list[str] = []

    def recorded(students, teachers, p):
        calls.append("forward")
        loss = providers.authors(students, teachers, p)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: calls.append("backward"))
        return loss

    cell = pick("cifar-nchw-fp32")
    subject = Subject(providers.Provider("recorded", recorded), cell, *cell.make(CPU))
    contender = subject.contender(mode)
    for _ in range(2):
        calls.clear()
        contender.prepare()
        assert calls == (["forward"] if mode == "backward" else [])
        calls.clear()
        contender.run()
        assert calls == {"both": ["forward", "backward"]}.get(mode, [mode])
    subject.release()
    assert subject.students[0].grad is None


# --- reports ----------------------------------------------------------------------------------------


def row(cell: str, provider: str, milliseconds: float, **others: object) -> report.Row:
    floor = {"one": 1.0, "two": 0.5, "small": 0.01}[cell]
    return {
        "cell": cell,
        "workload": "imagenet",
        "batch": 256,
        "dtype": "bf16",
        "p": 2,
        "mode": "both",
        "timing": "eager",
        "provider": provider,
        "one_pass": False,
        "median_ms": milliseconds,
        "p20_ms": milliseconds,
        "p80_ms": milliseconds,
        "floor_ms": floor,
        "times_floor": milliseconds / floor,
        "student_bytes": 100,
        "teacher_bytes": 100,
        "declared_bytes": 400,
        "gb_per_s": 1.0,
        "percent_of_copy": 50.0,
        "copy_gb_per_s": 2.0,
        "launches": None,
        "launches_expected": None,
        "peak_extra_bytes": None,
    } | others


ROWS = [
    row("one", "compile", 4.0),
    row("one", "ours-a", 1.0),
    row("one", "ours-b", 3.0),
    row("two", "compile", 18.0),
    row("two", "ours-a", 2.0),
]


def test_table_of_losses() -> None:
    table = loss_tables.times_table("Both", ROWS)
    assert table.headers == [
        "cell",
        "floor ms",
        "compile ms (×floor)",
        "ours-a ms (×floor)",
        "ours-b ms (×floor)",
        "compile / ours-a",
    ]
    assert table.lines == [
        ["one", "1", "4 (4.00)", "1 (1.00)", "3 (3.00)", "4.00"],
        ["two", "0.5", "18 (36.00)", "2 (4.00)", "-", "9.00"],
        ["geometric mean", "", "(12.00)", "(2.00)", "(3.00)", "6.00"],
    ]
    summary = loss_tables.summarize(ROWS)
    assert summary["compile"] == pytest.approx(
        {"times_floor": 12, "times_ours": 6, "least_times_ours": 4, "most_times_ours": 9}
    )
    assert summary["ours-a"]["times_ours"] == 1


def test_table_without_ours() -> None:
    table = loss_tables.times_table("Both", [r for r in ROWS if r["provider"] == "compile"])
    assert table.headers == ["cell", "floor ms", "compile ms (×floor)"]
    assert table.lines[-1] == ["geometric mean", "", "(12.00)"]


def test_modes_and_timings_are_kept_apart() -> None:
    rows = [
        *ROWS,
        row("one", "ours-a", 0.4, timing="graph"),
        row("one", "ours-a", 0.7, mode="forward"),
    ]
    headings = [table.heading for table in loss_tables.tables(rows)]
    assert headings == [
        "Forward and backward, called from Python",
        "Forward and backward, replayed as a CUDA graph",
        "Forward, called from Python",
        "Details",
    ]
    assert loss_tables.main_group(rows) == [rows[5]]
    assert loss_tables.host_overhead_us(rows[1], rows) == pytest.approx(600)
    assert loss_tables.host_overhead_us(rows[0], rows) is None
    assert loss_tables.host_overhead_us(rows[5], rows) is None


def test_details() -> None:
    rows = [row("one", "ours-a", 1.0, launches=3, launches_expected=3, peak_extra_bytes=4, one_pass=True)]
    (line,) = loss_tables.details_table(rows).lines
    assert line[3:] == ["ours-a (one pass)", "1 (1 to 1)", "0.0", "1.0", "50", "3 (≤ 3)", "4e-06 (2.00)", "-"]


def test_page_names_the_machine() -> None:
    table = report.Table("Heading", ["a", "b"], [["1", "2"]])
    page = report.markdown("Title", report.describe_machine(CPU), [table])
    assert page.startswith("# Title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nMeasured on: date ")
    assert torch.__version__ in page
    assert "threads 1" in page
    assert "\n\n## Heading\n\n" in report.markdown("Title", None, [table, table])


def test_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "abc1234")
    assert report.describe_machine(CPU)["commit"] == "abc1234"


# --- predictions ------------------------------------------------------------------------------------


def test_predictions_are_not_taken_for_measurements(tmp_path: Path) -> None:
    assert predictions.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "gpu-predictions.md").read_text()
    # ImageNet, ResNet-18 <- 34, B=256 bf16: 3S+T and 2S+T of S = T = 192.7 MB; maps of 4165 positions in fp32
    assert "| imagenet-bf16 | 256 | 192.7 | 192.7 | 770.7 | 578.0 | 4.26 (1.11) | ≤ 2 + 1 | ≤ 2 + 1 |" in page
    assert page.count(f"| {predictions.NOT_MEASURED} |") >= len(predictions.GOALS)
    assert "reached" not in page
    assert "missed" not in page
    assert "Measured on" not in page


def test_predicted_share_of_the_bandwidth() -> None:
    """ImageNet on an H200, channels-last: 39.8 instructions per vector of a map, 35.5 of the gradient."""
    (cell,) = [
        cell
        for cell in select_cells(device_type="cuda", layouts=("channels_last",), dtypes=("bf16",))
        if (cell.workload, cell.p) == ("imagenet", 2)
    ]
    h200 = next(gpu for gpu in issue.GPUS if gpu.name == "H200")
    s = t = 192.675840e6
    memory = (3 * s + t) / 4.3e12
    issued = (39.8 * (s + t) + 35.5 * s) / 16 / (132 * 4 * 32 * 1.97e9)
    expected = memory / ((memory**4 + issued**4) ** 0.25 + 6e-6)
    assert issue.share(cell, h200, one_pass=False) == pytest.approx(expected, rel=1e-4)
    assert issue.walks(cell, one_pass=True) == {
        "channels-last map": t,
        "channels-last map, staged": s,
        "channels-last gradient, staged": s,
    }


def test_goals_take_the_worst_cell_of_the_best_backend() -> None:
    graph = {"timing": "graph", "mode": "both"}
    rows = [
        row("one", "ours-a", 1.0, **graph, percent_of_copy=95.0),
        row("one", "ours-b", 2.0, **graph, percent_of_copy=47.0),
        row("two", "ours-a", 2.0, **graph, percent_of_copy=83.0),
        row("one", "compile", 2.5, **graph),
        row("two", "compile", 4.5, **graph),
        row("one", "authors-autocast", 5.0, **graph),
        row("one", "ours-a", 9.0, **graph, dtype="fp32", percent_of_copy=1.0),
        row("one", "ours-a", 1.5, peak_extra_bytes=1),
        row("one", "authors", 9.0, peak_extra_bytes=500),
        row("small", "ours-a", 0.020, **graph, workload="cifar"),
        row("two", "ours-a", 0.010, **graph, workload="cifar"),
        row("small", "ours-a", 0.120, workload="cifar"),
        {"step": "AttentionTransfer", "cost_percent": 0.7},
    ]
    lines = {goal.text: goal.line(rows)[2:] for goal in predictions.GOALS}
    found = [tuple(line) for line in lines.values()]
    assert found == [
        ("83", "missed"),
        ("not measured", ""),
        ("5", "missed"),
        ("2.25", "reached"),
        ("0.5", "reached"),
        ("250", ""),
        ("not measured", ""),
        ("20", "reached"),
        ("100", "reached"),
        ("0.7", "reached"),
    ]


def test_measured_results_fill_the_page(tmp_path: Path) -> None:
    rows = [row("one", "ours-a", 0.5, timing="graph", copy_gb_per_s=4000.0)]
    content = {"machine": {"gpu": "G"}, "rows": rows}
    (tmp_path / "loss-cuda.json").write_text(json.dumps(content))
    assert predictions.main(["--out", str(tmp_path), "--measured", str(tmp_path)]) == 0
    page = (tmp_path / "gpu-predictions.md").read_text()
    # 770.7 MB and 578.0 MB at 4 TB/s; 500 µs measured
    assert "| ≤ 2 + 1 | 192.7 | 500.0 | 144.5 | not measured |" in page
    assert page.endswith("Measured on: gpu G.\n")


def test_predictions_want_results_where_they_are_said_to_be(tmp_path: Path, capsys) -> None:
    assert predictions.main(["--out", str(tmp_path / "out"), "--measured", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"predictions: {tmp_path} holds no *-cuda.json\n"


# --- runs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_loss_run(tmp_path: Path) -> None:
    command = ["--suite", "loss", "--quick", "--threads", "1", "--out", str(tmp_path)]
    chosen = ["--workloads", "cifar", "--layouts", "nchw", "--modes", "forward", "backward", "both"]
    assert run.main([*command, *chosen, "--providers", "authors", "vecdot"]) == 0
    result = json.loads((tmp_path / "loss-cpu.json").read_text())
    assert [(row["cell"], row["mode"], row["provider"]) for row in result["rows"]] == [
        (f"cifar-nchw-{dtype}", mode, provider)
        for dtype in ("fp32", "bf16")
        for mode in ("forward", "backward", "both")
        for provider in ("authors", "vecdot")
    ]
    for row in result["rows"]:
        assert row["batch"] == 2
        assert row["rounds"] == 3
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        s, t = row["student_bytes"], row["teacher_bytes"]
        floor_bytes = {"forward": s + t, "backward": 2 * s, "both": 3 * s + t}[row["mode"]]
        assert row["declared_bytes"] == floor_bytes
        assert row["floor_ms"] == pytest.approx(floor_bytes / row["copy_gb_per_s"] / 1e6)
        assert row["times_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
        assert row["percent_of_copy"] == pytest.approx(100 / row["times_floor"])
        assert (row["peak_extra_bytes"] is None) == (row["mode"] != "both")
    assert len(result["summary"]) == 3
    with (tmp_path / "loss-cpu.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    assert (tmp_path / "loss-cpu.md").read_text().count("\n| cifar-nchw-") == 3 * 2 + 12
    assert (tmp_path / "loss-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quick_memory_run(tmp_path: Path) -> None:
    command = ["--suite", "memory", "--quick", "--threads", "1", "--out", str(tmp_path)]
    assert run.main([*command, "--cells", "cifar-nchw", "--providers", "authors", "vecdot"]) == 0
    rows = json.loads((tmp_path / "memory-cpu.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(row["peak_extra_bytes"] > 0 for row in rows)


@pytest.mark.slow
def test_quick_scaling_run(tmp_path: Path) -> None:
    command = ["--suite", "scaling", "--quick", "--threads", "1", "--out", str(tmp_path)]
    assert run.main([*command, "--providers", "vecdot"]) == 0
    rows = json.loads((tmp_path / "scaling-cpu.json").read_text())["rows"]
    assert [(row["batch"], row["channels"]) for row in rows] == [(1, 128), (2, 128), (32, 16), (32, 32)]
    assert (tmp_path / "scaling-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quick_teacher_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filled cache is read: from then on no teacher runs."""
    asked: list[str] = []
    train_step = loop.train_step

    def recorded(of: Run, images: Tensor, targets: Tensor, batch: int, taught: Any) -> None:
        asked.append("alone" if of.teacher is None else "teacher" if taught is None else "cache")
        train_step(of, images, targets, batch, taught)

    monkeypatch.setattr(loop, "train_step", recorded)
    command = ["--suite", "teacher", "--quick", "--threads", "1", "--rounds", "2", "--out", str(tmp_path)]
    assert run.main(command) == 0
    rows = json.loads((tmp_path / "teacher-cpu.json").read_text())["rows"]
    assert [row["what"] for row in rows] == [*teacher_suite.FORMS, "as given", "folded"]
    assert rows[0]["ratio"] == 1
    for row in rows[:3]:
        assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
    assert [asked.count(what) for what in ("alone", "teacher", "cache")] == [8, 8, 8]


@pytest.mark.slow
def test_quick_step_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = step_probe.SETTINGS["cpu"]
    small = dataclasses.replace(setting, student="wrn-10-1", teacher="wrn-10-2", size=8)
    monkeypatch.setitem(step_probe.SETTINGS, "cpu", small)
    monkeypatch.setattr(step_probe, "in_a_process", step_probe.measure)
    compile_ = torch.compile  # for its graphs, not for their code
    monkeypatch.setattr(
        torch, "compile", lambda run, **options: compile_(run, backend="aot_eager", **options)
    )
    assert run.main(["--suite", "step", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "step-cpu.json").read_text())["rows"]
    assert [(row["mode"], row["step"]) for row in rows] == [
        (mode, step) for mode in step_probe.MODES for step in step_probe.TERMS
    ]
    assert all(row["cost_percent"] == 0 for row in rows if row["step"] == "without AT")
    assert all(row["peak_bytes"] > 0 for row in rows)
    assert all(row["images_per_second"] == pytest.approx(2e3 / row["median_ms"]) for row in rows)


def test_a_step_in_fp16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--suite", "step", "--dtypes", "fp16", "--out", str(tmp_path)]) == 2
    assert "--suite step takes --dtypes bf16 or fp32, not fp16" in capsys.readouterr().err


def test_step_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [{"mode": "eager", "step": "without AT", "median_ms": 2.0, "ratio": 1.0, "peak_bytes": 4}]
    done = subprocess.CompletedProcess([], 0, stdout="noise\n" + json.dumps(answer), stderr="")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: done)
    assert step_probe.in_a_process(2, CPU, 1) == answer
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], 1, stdout="", stderr="x\nKilled")
    )
    with pytest.raises(RuntimeError, match="step: Killed"):
        step_probe.in_a_process(2, CPU, 1)


def test_steps_are_medians_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([(10.0, 1.00), (12.0, 1.06), (11.0, 1.02)])

    def one(batch: int, device: torch.device, rounds: int, dtype: str) -> list[dict]:
        assert dtype == "fp32"
        time, ratio = next(measured)
        return [{"mode": "eager", "step": "s", "median_ms": time, "ratio": ratio, "peak_bytes": 7}]

    monkeypatch.setattr(step_probe, "in_a_process", one)
    (row,) = step_suite.measure_steps(22, CPU, 5, 3, "fp32")
    assert (row["median_ms"], row["least_ms"], row["most_ms"]) == (11.0, 10.0, 12.0)
    assert row["cost_percent"] == pytest.approx(2)
    assert (row["least_cost_percent"], row["most_cost_percent"]) == (pytest.approx(0), pytest.approx(6))
    assert row["images_per_second"] == 2000


def test_the_terms_of_the_step_are_the_same_loss() -> None:
    """Every form gives the authors' loss on the same networks and images, and trains the same student."""
    gradients = {}
    for name, make in step_probe.TERMS.items():
        if make is None:
            continue
        torch.manual_seed(0)
        student, teacher = models.create("wrn-16-1", 10), models.create("wrn-16-2", 10).eval()
        term = make(student, teacher)
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            teacher(images)
        student(images)
        value = term()
        value.backward()
        gradients[name] = value.detach(), student.get_submodule("conv").weight.grad.clone()
    value, gradient = gradients["authors' form"]
    for name, (its_value, its_gradient) in gradients.items():
        torch.testing.assert_close(its_value, value, msg=name)
        assert (its_gradient - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_step_of_the_gpu_setting() -> None:
    setting = step_probe.SETTINGS["cuda"]
    assert (setting.student, setting.teacher, setting.batch) == ("resnet-18", "resnet-34", 256)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "loss", "--cells", "nothing"], "no cell contains 'nothing'"),
        (["--suite", "loss", "--device", "toaster"], "toaster"),
        (["--suite", "loss", "--device", "meta"], "--device is cpu or cuda, not meta"),
        (["--suite", "loss", "--timings", "graph"], "--timings graph takes a CUDA device"),
        (["--suite", "memory", "--providers", "mine"], "no provider 'mine' on cpu"),
    ],
)
def test_mistakes_take_one_line(arguments, message, tmp_path: Path, capsys) -> None:
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
