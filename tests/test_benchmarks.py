"""The benchmark counts bytes and times right, compares like with like, and writes what it measured."""

import csv
import json
from pathlib import Path

import pytest
import torch

from benchmarks import loss_suite, providers, report, run, step_suite, timing
from benchmarks.workloads import CELLS, select_cells

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, student, teacher",
    [
        # (16*32*32 + 32*16*16 + 64*8*8) * 128 * 4 bytes, and twice the channels
        ("cifar-nchw-fp32", 14_680_064, 29_360_128),
        ("cifar-channels_last-bf16", 7_340_032, 14_680_064),
        # (64*56*56 + 128*28*28 + 256*14*14 + 512*7*7) * 32 * 4 bytes on both sides
        ("imagenet-channels_last-fp32", 48_168_960, 48_168_960),
        ("imagenet-nchw-bf16", 24_084_480, 24_084_480),
    ],
)
def test_bytes_of_a_cell(name: str, student: int, teacher: int) -> None:
    (cell,) = select_cells(name)
    assert cell.student_bytes == student
    assert cell.teacher_bytes == teacher
    assert cell.floor_bytes == 3 * student + teacher


@pytest.mark.parametrize("cell", select_cells(batch=2), ids=lambda cell: cell.name)
def test_features_are_what_the_cell_says(cell) -> None:
    students, teachers = cell.make(CPU)
    assert sum(s.numel() * s.element_size() for s in students) == cell.student_bytes
    assert sum(t.numel() * t.element_size() for t in teachers) == cell.teacher_bytes
    assert all(s.requires_grad and s.is_leaf for s in students)
    assert not any(t.requires_grad for t in teachers)
    channel_strides = {feature.stride(1) == 1 for feature in (*students, *teachers)}
    assert channel_strides == {cell.layout == "channels_last"}


def test_cells_are_all_combinations() -> None:
    assert len({cell.name for cell in CELLS}) == 8
    with pytest.raises(ValueError, match="cifar-nchw-fp32"):
        select_cells("no such cell")


def test_percentiles_and_means() -> None:
    times = timing.Times((4.0, 1.0, 3.0, 2.0, 5.0))
    assert times.median == 3.0
    assert times.percentile(20) == pytest.approx(1.8)
    assert times.percentile(80) == pytest.approx(4.2)
    assert timing.percentile([7.0], 20) == 7.0
    assert report.geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


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


def test_wrong_values_are_not_timed() -> None:
    (cell,) = select_cells("cifar-nchw-fp32", batch=2)
    students, teachers = cell.make(CPU)
    right = {"authors": providers.authors, "vecdot": providers.vecdot, "ours": providers.ours}
    loss_suite.check_agreement(right, students, teachers, cell)
    assert all(student.grad is None for student in students)
    wrong = {"scaled": lambda s, t: 1.01 * providers.authors(s, t)}
    with pytest.raises(RuntimeError, match="scaled is off"):
        loss_suite.check_agreement(wrong, students, teachers, cell)
    value_only = {"constant": lambda s, t: providers.authors(s, t).detach() + 0 * s[0].sum()}
    with pytest.raises(RuntimeError, match="constant"):
        loss_suite.check_agreement(value_only, students, teachers, cell)


def rows() -> list[report.Row]:
    measured = {"one": {"compile": 4.0, "ours": 1.0}, "two": {"compile": 18.0, "ours": 2.0}}
    floors = {"one": 1.0, "two": 0.5}
    return [
        {
            "cell": cell,
            "provider": provider,
            "median_ms": milliseconds,
            "floor_ms": floors[cell],
            "times_floor": milliseconds / floors[cell],
        }
        for cell, entries in measured.items()
        for provider, milliseconds in entries.items()
    ]


def test_table_of_losses() -> None:
    headers, lines = loss_suite.table(rows())
    assert headers == ["cell", "floor ms", "compile ms (×floor)", "ours ms (×floor)", "compile / ours"]
    assert lines == [
        ["one", "1.00", "4.00 (4.00)", "1.00 (1.00)", "4.00"],
        ["two", "0.50", "18.00 (36.00)", "2.00 (4.00)", "9.00"],
        ["geometric mean", "", "(12.00)", "(2.00)", "6.00"],
    ]
    summary = loss_suite.summarize(rows())
    assert summary["compile"] == pytest.approx(
        {"times_floor": 12, "times_ours": 6, "least_times_ours": 4, "most_times_ours": 9}
    )
    assert summary["ours"]["times_ours"] == 1


def test_table_without_ours() -> None:
    headers, lines = loss_suite.table([row for row in rows() if row["provider"] == "compile"])
    assert headers == ["cell", "floor ms", "compile ms (×floor)"]
    assert lines[-1] == ["geometric mean", "", "(12.00)"]


def test_page_names_the_machine() -> None:
    page = report.markdown("Title", report.describe_machine(CPU), ["a", "b"], [["1", "2"]])
    assert page.startswith("# Title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nMeasured on: date ")
    assert torch.__version__ in page
    assert "threads 1" in page


@pytest.mark.slow
def test_quick_loss_run(tmp_path: Path) -> None:
    command = [
        "--suite",
        "loss",
        "--quick",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
        "--cells",
        "cifar-nchw",
    ]
    assert run.main([*command, "--providers", "authors", "vecdot", "ours"]) == 0
    result = json.loads((tmp_path / "loss-cpu.json").read_text())
    assert [(row["cell"], row["provider"]) for row in result["rows"]] == [
        (f"cifar-nchw-{dtype}", provider)
        for dtype in ("fp32", "bf16")
        for provider in ("authors", "vecdot", "ours")
    ]
    for row in result["rows"]:
        assert row["batch"] == 2
        assert row["rounds"] == 3
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        floor_bytes = 3 * row["student_bytes"] + row["teacher_bytes"]
        assert row["floor_ms"] == pytest.approx(floor_bytes / row["copy_gb_per_s"] / 1e6)
        assert row["times_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
    assert set(result["summary"]) == {"authors", "vecdot", "ours"}
    with (tmp_path / "loss-cpu.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert (tmp_path / "loss-cpu.md").read_text().count("\n| cifar-nchw-") == 2
    assert (tmp_path / "loss-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quick_step_run(tmp_path: Path) -> None:
    assert run.main(["--suite", "step", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "step-cpu.json").read_text())
    assert [row["step"] for row in result["rows"]] == list(step_suite.terms())
    assert result["rows"][0]["cost_percent"] == 0
    assert all(row["images_per_second"] == pytest.approx(2e3 / row["median_ms"]) for row in result["rows"])


def test_attention_terms_of_the_step_are_the_same_loss() -> None:
    (cell,) = select_cells("cifar-nchw-fp32", batch=2)
    students, teachers = cell.make(CPU)
    plain, ours, eager = step_suite.terms().values()
    assert plain is None
    assert ours is not None
    assert eager is not None
    torch.testing.assert_close(ours(students, teachers), eager(students, teachers))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "loss", "--cells", "nothing"], "no cell contains 'nothing'"),
        (["--suite", "loss", "--device", "toaster"], "toaster"),
    ],
)
def test_mistakes_take_one_line(arguments, message, tmp_path: Path, capsys) -> None:
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
