"""Suite "trainer": images per second of train.py beside those of a loop written by hand."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import models
from at_fused.visualize.images import class_folders
from at_fused.visualize.paths import user_path
from benchmarks.measure import timing
from benchmarks.report import Result, Row, Table
from benchmarks.suites import bare_loop, footprint
from models import TappedModel
from trainer import distributed, loop
from trainer.config import Config, make_config
from trainer.data.in_memory import ImageSet
from trainer.data.sampling import stratified
from trainer.run import Run
from trainer.torch_settings import set_up_torch

ROUNDS = 9
CPU = torch.device("cpu")
FOLDER = "imagefolder"


def arguments(parser: argparse.ArgumentParser) -> None:
    footprint.arguments(parser)
    parser.add_argument(
        "--folder", type=user_path, metavar="DIR", help="has train and val, of ImageNet-like files"
    )


def measure(options: argparse.Namespace, device: torch.device, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yields the row of each case."""
    there = {row["case"] for row in rows}
    for case, data_dir in cases(options.cifar, options.folder, device).items():
        if case.name not in there:
            print(case.name, flush=True)
            measured = case.quick() if options.quick else case
            yield [measure_case(measured, data_dir, options.rounds, device)]


def result(rows: Sequence[Row], options: argparse.Namespace, device: torch.device) -> Result:
    return Result("train.py beside a loop written by hand, bf16, channels_last", [table(rows)])


@dataclass(frozen=True)
class Case:
    """What is trained: in bf16 and channels-last, with AT where there is a teacher."""

    name: str
    dataset: str
    student: str
    teacher: str | None = None
    batch: int = 128
    images: int = 1280  # that a round trains on: of image files the whole set, else the epoch's first
    size: int = 32
    workers: int = 0
    compile: bool = False  # train.py's models; the bare loop's are not compiled
    cuda_graphs: bool = False

    @property
    def steps(self) -> int:
        return -(-self.images // self.batch)

    def quick(self) -> Case:
        return replace(self, batch=4, images=8, size=min(self.size, 32))

    def config(self, data_dir: Path | None, scratch: Path, device: torch.device = CPU) -> Config:
        """The configuration of train.py; `scratch` holds the run's folder and the teacher."""
        values = {
            "dataset": self.dataset,
            "data-dir": data_dir,
            "student": self.student,
            "batch-size": self.batch,
            "limit-train": self.images if self.dataset == FOLDER else None,
            "image-size": self.size,
            "workers": self.workers,
            "amp": "bf16",
            "channels-last": True,
            "lr": 0.01,
            "lr-schedule": "constant",
            "epochs": 10**6,
            "compile": self.compile,
            "cuda-graphs": self.cuda_graphs,
            "device": device.type,
            "output-dir": scratch / "run",
        }
        if self.teacher:
            weights = scratch / "teacher.pt"
            folders = data_dir / "train" if data_dir and self.dataset == FOLDER else None
            classes = len(class_folders(folders)[0]) if folders else 10
            torch.save(models.create(self.teacher, classes).state_dict(), weights)
            values |= {"method": "at", "teacher": self.teacher, "teacher-checkpoint": weights}
        return make_config(values)


def cases(cifar: Path | None, folder: Path | None, device: torch.device = CPU) -> dict[Case, Path | None]:
    """What can be trained on these data, and where they lie; digits, which need no files, for CIFAR-10.

    On a GPU, whose launches take longer than such small networks, also compiled and as CUDA graphs.
    """
    small = "cifar10" if cifar else "digits"
    images = 1280 if cifar else 896
    small_cases = [
        Case(f"{small}, WRN-16-1", small, "wrn-16-1", images=images),
        Case(f"{small}, WRN-16-1 with AT from WRN-16-2", small, "wrn-16-1", "wrn-16-2", images=images),
    ]
    if device.type == "cuda":
        compiled = [replace(case, name=f"{case.name}, compiled", compile=True) for case in small_cases]
        graphs = [replace(case, name=f"{case.name} as CUDA graphs", cuda_graphs=True) for case in compiled]
        small_cases += compiled + graphs
    found: dict[Case, Path | None] = dict.fromkeys(small_cases, cifar)
    if folder:
        name = "image files, data-bound: WRN-10-1 at 16 pixels"
        # One worker: on two cores a second one takes from the steps the core that it waits for.
        bound = Case(name, FOLDER, "wrn-10-1", batch=50, images=1500, size=16, workers=1)
        name = "image files, compute-bound: ResNet-18 at 96 pixels"
        computes = Case(name, FOLDER, "resnet-18", batch=32, images=256, size=96, workers=2)
        name = "image files, ResNet-18 with AT from ResNet-34 at 224 pixels"
        distils = Case(name, FOLDER, "resnet-18", "resnet-34", batch=16, images=32, size=224, workers=2)
        found |= dict.fromkeys((bound, computes, distils), folder)
    return found


class Waits:
    """The batches of a loop, and how many seconds it has waited for them in all."""

    def __init__(self, batches: bare_loop.Batches) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        begun = time.perf_counter()
        for batch in self.batches:
            self.seconds += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()


def processor_seconds() -> float:
    """What this process and its workers have computed so far: other processes alter it little."""
    workers = multiprocessing.active_children()
    # Linux numbers the clock of another process's processor time so; elsewhere the workers do not count.
    clocks = [~int(worker.pid or 0) << 3 | 2 for worker in workers] if sys.platform == "linux" else []
    return time.process_time() + sum(map(time.clock_gettime, clocks))


@contextmanager
def contenders(
    case: Case, data_dir: Path | None, device: torch.device = CPU
) -> Iterator[tuple[list[timing.Contender], Waits]]:
    """A round of train.py and one of the bare loop; the latter's waits for its images."""
    with tempfile.TemporaryDirectory() as scratch:
        config = case.config(data_dir, Path(scratch), device)
        with distributed.ranks(config) as ranks, closing(distributed.StopRequest(ranks)) as stop:
            set_up_torch(config, ranks)
            run = Run(config, ranks)
            run.last_step = case.steps
            run.reporter.console.quiet = True
            waits = Waits(bare_batches(case, run, config))
            bare = bare_loop.epoch(*bare_models(case, run), waits)

            def train() -> None:
                run.progress.step = 0
                loop.train_steps(run, stop, time.perf_counter())
                run.watch.wait()

            yield [timing.Contender("train.py", train), timing.Contender("bare loop", bare)], waits


def bare_models(case: Case, run: Run) -> tuple[TappedModel, TappedModel | None]:
    """The same architectures with weights of their own."""

    def create(name: str) -> TappedModel:
        model = models.create(name, run.dataset.classes)
        return model.to(run.ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    teacher = create(case.teacher).eval().requires_grad_(False) if case.teacher else None
    return create(case.student), teacher


def bare_batches(case: Case, run: Run, config: Config) -> bare_loop.Batches:
    """The same images, as many to a batch, by other code."""
    dataset = run.dataset
    if isinstance(dataset, ImageSet):
        train = dataset.train
        augmentation = dataset.pad, dataset.flip
        return bare_loop.InMemory(train.images, train.labels, case.batch, *augmentation, steps=case.steps)
    root = Path(str(config.data_dir)) / "train"
    labels = torch.tensor(bare_loop.ImageFolder(root).targets)
    chosen = stratified(labels, case.images, config.seed).tolist()
    return bare_loop.FromFolder(root, chosen, case.batch, case.size, case.workers)


def measure_case(case: Case, data_dir: Path | None, rounds: int, device: torch.device = CPU) -> Row:
    """Images per second of both, and the ratio round by round."""
    computed: dict[str, list[float]] = {}

    def accounted(contender: timing.Contender) -> timing.Contender:
        def run() -> None:
            before = processor_seconds()
            contender.run()
            computed.setdefault(contender.name, []).append(processor_seconds() - before)

        return timing.Contender(contender.name, run)

    with contenders(case, data_dir, device) as (both, waits):
        timing.interleave(both, 1, device, warmup=0)  # workers start, kernels are chosen
        waits.seconds = 0.0
        times = timing.interleave([accounted(contender) for contender in both], rounds, device, warmup=0)
    ours, bare = times["train.py"], times["bare loop"]
    ratios = [b / a for a, b in zip(ours.seconds, bare.seconds, strict=True)]
    processor = [b / a for a, b in zip(computed["train.py"], computed["bare loop"], strict=True)]
    return {
        "case": case.name,
        "batch": case.batch,
        "images": case.images,
        "workers": case.workers,
        "compile": case.compile,
        "cuda_graphs": case.cuda_graphs,
        "images_per_second": case.images / ours.median,
        "bare_images_per_second": case.images / bare.median,
        "ratio": timing.percentile(ratios, 50),
        "ratio_p20": timing.percentile(ratios, 20),
        "ratio_p80": timing.percentile(ratios, 80),
        "processor_ratio": timing.percentile(processor, 50),
        "processor_ratio_p20": timing.percentile(processor, 20),
        "processor_ratio_p80": timing.percentile(processor, 80),
        "waiting_percent": waits.seconds / sum(bare.seconds) * 100,
        "more_ms_per_step": (ours.median - bare.median) / case.steps * 1e3,
        "rounds": rounds,
    }


def table(rows: Sequence[Row]) -> Table:
    """A line per case."""

    def ratio(row: Row, name: str) -> str:
        return f"{row[name]:.3f} ({row[f'{name}_p20']:.3f} to {row[f'{name}_p80']:.3f})"

    headers = [
        "case",
        "batch",
        "train.py, images/s",
        "bare loop, images/s",
        "ratio (p20 to p80)",
        "of processor time",
        "ms more per step",
        "waits for images, %",
    ]
    lines = [
        [
            row["case"],
            str(row["batch"]),
            f"{row['images_per_second']:.0f}",
            f"{row['bare_images_per_second']:.0f}",
            ratio(row, "ratio"),
            ratio(row, "processor_ratio"),
            f"{row['more_ms_per_step']:+.1f}",
            f"{row['waiting_percent']:.0f}",
        ]
        for row in rows
    ]
    return Table("Steps of train.py and of a bare loop, in turns", headers, lines)
