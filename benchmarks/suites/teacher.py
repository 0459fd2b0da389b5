"""Suite "teacher": what the teacher costs a training by train.py, and what a filled cache of it saves."""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from at_fused.visualize.paths import user_path
from benchmarks.measure import timing
from benchmarks.report import Result, Row, Table
from trainer import distributed, loop
from trainer.config import make_config
from trainer.folding import fold_batch_norms
from trainer.run import Run
from trainer.torch_settings import set_up_torch

ROUNDS = 9
STUDENT, TEACHER, BATCH = "wrn-16-1", "wrn-16-2", 128
AT = {"method": "at", "teacher": TEACHER}
FORMS: dict[str, dict[str, Any]] = {
    "student alone": {},
    "AT": AT,
    "AT, teacher cached": AT | {"augment-cycle": 1, "teacher-cache": "memory"},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cifar", type=user_path, metavar="DIR", help="has cifar-10-batches-py (default: digits)"
    )
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="of the training")


def measure(options: argparse.Namespace, device: torch.device, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yields the rows of the eager trainings, those of the compiled ones, and those of the teacher alone."""
    there = {(row["what"], row["compiled"]) for row in rows}
    images, batch = (8, 4) if options.quick else (896, BATCH)
    for compiled in (False,) if options.quick else (False, True):
        if ("student alone", compiled) not in there:
            yield trainings(options, device, compiled, images, batch)
    if ("as given", False) not in there:
        yield forward_passes(options, device, batch)


def trainings(
    options: argparse.Namespace, device: torch.device, compiled: bool, images: int, batch: int
) -> list[Row]:
    """A row for each of FORMS, which take turns epoch by epoch."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        weights = Path(scratch) / "teacher.pt"
        torch.save(models.create(TEACHER, 10).state_dict(), weights)
        keys: dict[str, Any] = {
            "dataset": "cifar10" if options.cifar else "digits",
            "data-dir": options.cifar,
            "student": STUDENT,
            "batch-size": batch,
            "limit-train": images,
            "epochs": 10**6,
            "lr": 0.01,
            "lr-schedule": "constant",
            "amp": options.amp,
            "channels-last": True,
            "compile": compiled,
            "device": device.type,
        }
        contenders = []
        for form, special in FORMS.items():
            values = keys | special | {"output-dir": Path(scratch) / form}
            config = make_config(values | ({"teacher-checkpoint": weights} if special else {}))
            ranks = stack.enter_context(distributed.ranks(config))
            stop = stack.enter_context(closing(distributed.StopRequest(ranks)))
            set_up_torch(config, ranks)
            contenders.append(timing.Contender(form, epoch(Run(config, ranks), stop)))
        times = timing.interleave(contenders, options.rounds, device, warmup=2)  # the first fills the cache
    alone = times["student alone"].seconds
    rows = []
    for form, taken in times.items():
        ratios = [a / b for a, b in zip(alone, taken.seconds, strict=True)]
        rows.append(
            {
                "what": form,
                "compiled": compiled,
                "images": images,
                "batch": batch,
                "images_per_second": images / taken.median,
                "ratio": timing.percentile(ratios, 50),
                "ratio_p20": timing.percentile(ratios, 20),
                "ratio_p80": timing.percentile(ratios, 80),
                "rounds": options.rounds,
            }
        )
    return rows


def epoch(run: Run, stop: distributed.StopRequest) -> Callable[[], None]:
    """The next epoch of a run, without its evaluation."""
    run.reporter.console.quiet = True
    if run.cache is not None:
        run.cache.open()

    def train() -> None:
        loop.ready_cache(run, stop)
        loop.train_steps(run, stop, time.perf_counter())
        run.watch.wait()

    return train


def forward_passes(options: argparse.Namespace, device: torch.device, batch: int) -> list[Row]:
    """A row for each form of the teacher: its milliseconds for a batch."""

    def folded() -> nn.Module:
        network = copy.deepcopy(given)
        fold_batch_norms(network)
        return network

    given: nn.Module = models.create(TEACHER, 10).eval().requires_grad_(False)
    given = given.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    forms: dict[str, Callable[..., Any]] = {"as given": given, "folded": folded()}
    if not options.quick:
        forms["folded, compiled"] = torch.compile(folded())
        forms["folded, compiled with freezing"] = torch.compile(folded(), options={"freezing": True})
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=options.amp == "bf16")

    def forward(network: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), amp:
                network(images)

        return run

    contenders = [timing.Contender(form, forward(network)) for form, network in forms.items()]
    times = timing.interleave(contenders, 3 * options.rounds, device)
    return [
        {
            "what": form,
            "compiled": "compiled" in form,
            "batch": batch,
            "ms": taken.median * 1e3,
            "ms_p20": taken.percentile(20) * 1e3,
            "ms_p80": taken.percentile(80) * 1e3,
            "rounds": 3 * options.rounds,
        }
        for form, taken in times.items()
    ]


def result(rows: Sequence[Row], options: argparse.Namespace, device: torch.device) -> Result:
    precision = "fp32" if options.amp == "none" else options.amp
    title = f"What the teacher costs: train.py, {STUDENT} ← {TEACHER}, {precision}, channels_last"
    return Result(title, [table_of_trainings(rows), table_of_passes(rows)])


def table_of_trainings(rows: Sequence[Row]) -> Table:
    headers = ["training", "models", "images/s", "of the student alone (p20 to p80)"]
    lines = [
        [
            row["what"],
            "compiled" if row["compiled"] else "eager",
            f"{row['images_per_second']:,.0f}",
            f"{row['ratio']:.2f} ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})",
        ]
        for row in rows
        if "ratio" in row
    ]
    return Table("Epochs without their evaluation, in turns", headers, lines)


def table_of_passes(rows: Sequence[Row]) -> Table:
    headers = ["teacher", "forward pass, ms (p20 to p80)"]
    lines = [
        [row["what"], f"{row['ms']:.1f} ({row['ms_p20']:.1f} to {row['ms_p80']:.1f})"]
        for row in rows
        if "ms" in row
    ]
    return Table(f"The teacher alone, {rows[-1]['batch']} images" if rows else "", headers, lines)
