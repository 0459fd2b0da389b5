"""The trainer's cost is measured against the same work; start, memory and scale are counted right."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from runs import compile_without_code, make_folders
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import at_fused
import models
from benchmarks import __main__ as run
from benchmarks import report, scale
from benchmarks.measure import timing
from benchmarks.scale import Step
from benchmarks.suites import bare_loop, trainer_probe
from benchmarks.suites import footprint as footprint_suite
from benchmarks.suites import trainer as trainer_suite
from benchmarks.suites.trainer import Case
from models.wide_resnet import WideResNet

TOY = Case("toy", "digits", "wrn-10-1", batch=16, images=48)
TOY_AT = Case("toy with AT", "digits", "wrn-10-1", "wrn-10-2", batch=16, images=48)


# --- the bare loop does the trainer's work ----------------------------------------------------------


@pytest.mark.parametrize("case", [TOY, TOY_AT], ids=lambda case: case.name)
def test_both_do_the_same_work(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of the whole set through student and teacher, AT terms and optimizer steps; round by round."""
    passes: list[int] = []
    terms: list[int] = []
    steps: list[torch.optim.Optimizer] = []
    forward, term = WideResNet.forward, at_fused.AttentionLoss.forward
    transfer = at_fused.AttentionTransfer.__call__

    def counted(model: WideResNet, images: Tensor) -> Tensor:
        passes.append(len(images))
        if contending:
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.is_autocast_enabled("cpu")
            assert model.training == torch.is_grad_enabled()  # the teacher: neither
        return forward(model, images)

    def counted_term(module: at_fused.AttentionLoss, students: Any, teachers: Any) -> Tensor:
        terms.append(len(students))
        return term(module, students, teachers)

    def counted_transfer(module: at_fused.AttentionTransfer, *maps: Any) -> Tensor:
        value = transfer(module, *maps)
        terms.append(len(module.losses))
        return value

    monkeypatch.setattr(WideResNet, "forward", counted)
    monkeypatch.setattr(at_fused.AttentionLoss, "forward", counted_term)
    monkeypatch.setattr(at_fused.AttentionTransfer, "__call__", counted_transfer)
    contending = False
    with trainer_suite.contenders(case, None) as (both, waits):
        contending = True
        assert len(waits.batches.labels) == 1000  # type: ignore[attr-defined]
        with closing(_HookHandle(lambda optimizer, *_: steps.append(optimizer))):
            for contender in both * 2:
                for counts in (passes, terms, steps):
                    counts.clear()
                contender.run()
                networks = 2 if case.teacher else 1
                assert passes == [size for size in (16, 16, 16) for _ in range(networks)], contender.name
                assert terms == [3] * (3 if case.teacher else 0), contender.name
                assert len(steps) == 3, contender.name
                (group,) = steps[0].param_groups
                assert len(group["params"]) == len(list(models.create(case.student).parameters()))
                assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    assert waits.seconds > 0


@pytest.mark.slow
def test_compiled_and_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is asked, here without one."""
    compile_without_code(monkeypatch)
    row = trainer_suite.measure_case(replace(TOY, compile=True, cuda_graphs=True), None, 1)
    assert (row["compile"], row["cuda_graphs"]) == (True, True)
    assert row["ratio"] > 0


def test_gpu_trains_small_networks_in_every_form(tmp_path: Path) -> None:
    found = trainer_suite.cases(None, None, torch.device("cuda"))
    assert len({case.name for case in found}) == len(found) == 6
    configs = [case.config(data_dir, tmp_path, torch.device("cuda")) for case, data_dir in found.items()]
    assert {config.device for config in configs} == {"cuda"}
    forms = [(config.method, config.compile, config.cuda_graphs) for config in configs]
    assert sorted(forms) == [
        (method, *form) for method in ("at", "none") for form in ((False, False), (True, False), (True, True))
    ]


class _HookHandle:
    def __init__(self, hook: Callable[..., None]) -> None:
        self.close = register_optimizer_step_post_hook(hook).remove


def test_batches_in_memory_are_crops_of_the_reflected_images() -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (6, 5, 5, 3), dtype=torch.uint8)
    batches = list(bare_loop.InMemory(images, torch.arange(6), batch=4, pad=2, flip=True))
    assert [len(labels) for _, labels in batches] == [4, 2]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(6))
    pixels = images.float().flatten(0, 2)
    planes = ((images.float() - pixels.mean(0)) / pixels.std(0)).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(planes, (2,) * 4, mode="reflect")
    for batch, labels in batches:
        for image, label in zip(batch, labels, strict=True):
            crops = [padded[label, :, y : y + 5, x : x + 5] for y in range(5) for x in range(5)]
            crops += [crop.flip(2) for crop in crops]
            assert any(torch.allclose(image, crop, atol=1e-5) for crop in crops)


def test_both_read_the_same_files(tmp_path: Path) -> None:
    case = Case("files", "imagefolder", "wrn-10-1", batch=4, images=9, size=16)
    config = case.config(make_folders(tmp_path), tmp_path)
    with trainer_suite.distributed.ranks(config) as ranks:
        dataset = trainer_suite.Run(config, ranks)
        batches = trainer_suite.bare_batches(case, dataset, config)
    files = batches.loader.dataset  # type: ignore[attr-defined]
    paths = [files.dataset.samples[i][0] for i in files.indices]
    assert sorted(paths) == sorted(dataset.dataset.train.paths)  # type: ignore[union-attr]
    found = list(batches)
    assert [tuple(images.shape) for images, _ in found] == [(4, 3, 16, 16)] * 2 + [(1, 3, 16, 16)]
    assert sorted(torch.cat([labels for _, labels in found]).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert -3 < min(images.min() for images, _ in found) < max(images.max() for images, _ in found) < 3


def test_ratios_are_of_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"train.py": (2.0, 2.0, 4.0), "bare loop": (1.0, 1.6, 4.0)}
    clock = 0.0

    def interleave(both: list[timing.Contender], rounds: int, *args: Any, **options: Any) -> Any:
        for contender in both * 3 if rounds == 3 else []:
            contender.run()
        return {name: timing.Times(seconds) for name, seconds in times.items()}

    def contender(name: str, cost: float) -> timing.Contender:
        def compute() -> None:
            nonlocal clock
            clock += cost

        return timing.Contender(name, compute)

    both = [contender("train.py", 5.0), contender("bare loop", 4.5)]
    waits = trainer_suite.Waits([])
    monkeypatch.setattr(timing, "interleave", interleave)
    monkeypatch.setattr(trainer_suite, "processor_seconds", lambda: clock)
    monkeypatch.setattr(trainer_suite, "contenders", lambda *_: nullcontext((both, waits)))
    row = trainer_suite.measure_case(TOY, None, 3)
    assert (row["ratio"], row["images_per_second"], row["bare_images_per_second"]) == (0.8, 24, 30)
    assert row["processor_ratio"] == pytest.approx(0.9)
    assert row["more_ms_per_step"] == pytest.approx(400 / 3)


def _compute(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="workers are counted on Linux")
def test_processor_time_of_workers_counts() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        pool.submit(_compute, 0.0).result()
        before, own = trainer_suite.processor_seconds(), time.process_time()
        pool.submit(_compute, 0.3).result()
        found = trainer_suite.processor_seconds() - before - (time.process_time() - own)
    assert 0.3 <= found < 0.6


# --- start and memory -------------------------------------------------------------------------------


def test_slope_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(flags: list[str], eager: bool) -> int:
        batch = int(flags[flags.index("--batch-size") + 1])
        return 1000 + batch * ((30 if eager else 20) if "at" in flags else 10)

    monkeypatch.setattr(footprint_suite, "peak_bytes", peak)
    rows = footprint_suite.measure_memory(None, (2, 4, 8))
    assert [row["bytes_per_image"] for row in rows] == pytest.approx([10, 20, 30])
    assert [row["constant_bytes"] for row in rows] == pytest.approx([1000] * 3)
    assert rows[0]["peak_bytes_8"] == 1080


@pytest.mark.slow
def test_phases_add_up(tmp_path: Path) -> None:
    command = footprint_suite.flags(None, tmp_path, teacher=True)
    seconds = trainer_probe.start_up(command)
    assert list(seconds) == [*trainer_probe.PHASES, "total"]
    assert all(seconds[phase] > 0 for phase in trainer_probe.PHASES)
    assert sum(seconds[phase] for phase in trainer_probe.PHASES) == pytest.approx(seconds["total"])
    assert not (tmp_path / "run" / "checkpoint.pt").exists()  # it ended with the first step


@pytest.mark.slow
def test_peak_memory_is_that_of_the_steps(tmp_path: Path) -> None:
    """A larger batch needs more; the eager form more than ours; the parent's memory does not count."""
    ballast = torch.ones(2**28)  # 1 GiB
    peaks = []
    for name, batch, eager in (("a", 16, False), ("b", 256, False), ("c", 256, True)):
        (tmp_path / name).mkdir()
        command = footprint_suite.flags(None, tmp_path / name, teacher=True)
        command += ["--batch-size", str(batch), "--limit-test", "10", "--amp", "none"]
        peaks.append(trainer_probe.peak_bytes(command, eager))
    assert 2**27 < peaks[0] < peaks[1] < peaks[2] < ballast.nbytes


def test_probe_says_why_it_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="dataset cifar10 needs data-dir"):
        trainer_probe.start_up(["--student", "wrn-10-1"])


# --- the suites' pages ------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_trainer_run(tmp_path: Path) -> None:
    folder = make_folders(tmp_path / "images")
    threads = torch.get_num_threads()
    command = ["--suite", "trainer", "--quick", "--threads", "1", "--out", str(tmp_path)]
    try:
        assert run.main([*command, "--folder", str(folder)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "trainer-cpu.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [case.name for case in trainer_suite.cases(None, folder)]
    assert all(row["ratio"] > 0 and 0 < row["waiting_percent"] < 100 for row in rows)
    assert (tmp_path / "trainer-cpu.md").exists()
    assert (tmp_path / "trainer-cpu.csv").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "trainer", "--cifar", "nowhere"], "no folder cifar-10-batches-py"),
        (["--suite", "trainer", "--cifar", "nowhere", "--quick"], "no folder cifar-10-batches-py"),
    ],
)
def test_missing_data_take_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- scale ------------------------------------------------------------------------------------------


def test_ring_all_reduce() -> None:
    # Each of 4 ranks sends 3/4 of the buffer while summing and 3/4 while spreading the sums.
    assert scale.all_reduce_seconds(4_000_000, 4, 1e6) == pytest.approx(6.0)
    assert scale.all_reduce_seconds(4_000_000, 1, 1e6) == 0
    assert scale.gradient_bytes("resnet-18") == 4 * 11_689_512  # torchvision's ResNet-18


def test_seconds_of_a_run() -> None:
    step = Step(seconds=0.5, batch=10)
    settings: dict[str, Any] = {"bytes_per_second": 1e6, "images": 105, "epochs": 3}
    assert scale.run_seconds(step, 1, 200_000, **settings) == pytest.approx(
        3 * 11 * 0.5
    )  # 11th step: 5 images
    assert scale.run_seconds(step, 2, 200_000, **settings) == pytest.approx(
        3 * 6 * 0.7
    )  # 0.2 s of all-reduce
    assert scale.run_seconds(step, 2, 200_000, **settings, hidden=0.1) == pytest.approx(3 * 6 * 0.65)
    assert scale.run_seconds(step, 2, 200_000, **settings, hidden=0.9) == pytest.approx(3 * 6 * 0.5)
    assert step.images_per_second == 20


def test_work_of_the_networks() -> None:
    """Multiplications and additions of convolutions and fc: 1.82 and 3.67 billion, as published."""
    assert scale.forward_gflops("resnet-18") == pytest.approx(2 * 1.82, rel=0.01)
    assert scale.forward_gflops("resnet-34") == pytest.approx(2 * 3.67, rel=0.01)


@pytest.mark.parametrize(
    "arguments",
    [["--step-ms", "0"], ["--step-ms", "-1"], ["--batch", "0"], ["--gpus", "0"], ["--hidden", "2"]],
)
def test_scale_refuses_nonsense(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert scale.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_scale_takes_your_own_step(capsys: pytest.CaptureFixture) -> None:
    assert scale.main(["--step-ms", "100", "--batch", "200", "--gpus", "2"]) == 0
    page = capsys.readouterr().out
    assert "2,000, measured" in page
    assert "assumed" not in page


def test_page_on_scale_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    measured = ROOT / "benchmarks" / "results" / "amd-epyc" / "trainer-cpu.json"
    for table in scale.tables_of_the_page(measured):
        grid = report.markdown("", None, [table]).split("\n\n")[1]
        assert grid.strip() in page, table.heading
