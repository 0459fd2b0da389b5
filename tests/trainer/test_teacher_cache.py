"""A teacher that runs once: the same losses, the same bits however a run is cut, no trust in damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    SMALL,
    check_refusal,
    code_of,
    dashed,
    flags,
    fork_ranks,
    in_a_child,
    make_folders,
    metrics,
    results,
)
from test_kills import fatal

import train
from trainer import checkpoint, data, distributed
from trainer.config import make_config
from trainer.data import in_memory
from trainer.teacher_cache import TeacherCache, cache, records

# 72 images: steps of 32, 32 and 8. The student hardly moves, else roundings would grow with each step.
KEYS = SMALL | {"limit-train": 72, "batch-size": 32, "limit-test": 20, "epochs": 4, "lr": 1e-5}
KEYS |= {"augment-cycle": 2, "lr-schedule": "constant"}


def run(folder: Path, **keys: Any) -> int:
    return train.main(flags(KEYS | dashed(keys) | {"output-dir": folder}))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert run(folder, student="wrn-10-2", epochs=1, lr=0.05) == 0
    return {"teacher": "wrn-10-2", "teacher_checkpoint": folder / "model.pt", "method": "at+kd"}


@pytest.fixture(scope="module")
def kept(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and its cache."""
    folder = tmp_path_factory.mktemp("kept")
    assert run(folder / "run", **keys, teacher_cache=folder / "cache") == 0
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs (from 0) in which the teacher was asked about images, once for each image."""
    found: list[int] = []
    original = TeacherCache._rows

    def rows(self: TeacherCache, images: torch.Tensor) -> torch.Tensor:
        found.extend([self.epoch] * len(images))
        return original(self, images)

    monkeypatch.setattr(TeacherCache, "_rows", rows)
    return found


def same(folder: Path, other: Path) -> bool:
    weights = [(path / "model.pt").read_bytes() for path in (folder, other)]
    return weights[0] == weights[1] and metrics(folder) == metrics(other)


def close(folder: Path, other: Path, tolerance: float) -> None:
    for ours, theirs in zip(metrics(folder), metrics(other), strict=True):
        for key in [key for key in theirs if key.endswith("loss") or "/" in key]:
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (key, ours["epoch"])


# --- augmentation that repeats ------------------------------------------------------------------------


def test_augmentation_repeats_image_by_image() -> None:
    dataset: Any = data.load(make_config(SMALL | {"output-dir": "x"}), torch.device("cpu"))
    plans = [in_memory.plan_epoch(dataset, 0, epoch, cycle=3) for epoch in range(8)]
    orders = [plan.order.tolist() for plan in plans]
    assert len(set(map(tuple, orders))) == 8  # the order of the images is not repeated
    for epoch, plan in enumerate(plans):
        once = in_memory.plan_epoch(dataset, 0, epoch % 3)  # as without a cycle
        for name in ("down", "right"):
            ours, theirs = (getattr(p, name)[p.order.argsort()] for p in (plan, once))
            assert torch.equal(ours, theirs)
        assert torch.equal(plan.order, dataset.training_order(0, epoch))
    assert not torch.equal(plans[0].down[plans[0].order.argsort()], plans[1].down[plans[1].order.argsort()])


def test_augmentation_of_files_repeats(tmp_path: Path) -> None:
    images = make_folders(tmp_path / "images")
    keys = {"dataset": "imagefolder", "data-dir": images, "image-size": 8, "student": "wrn-10-1"}
    dataset = data.load(make_config(keys), torch.device("cpu"))
    size, seen = len(dataset.train), []
    for epoch, cycle in ((1, 0), (1, 2), (3, 2), (2, 2)):
        ((pixels, labels),) = dataset.training_batches(0, epoch, [slice(0, size)], cycle)
        order = dataset.training_order(0, epoch)
        assert torch.equal(labels, dataset.train.labels[order])
        seen.append(pixels[order.argsort()])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])


# --- the same losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, dtypes", [("at+kd", ["fp32", "fp16", "bf16"]), ("at", ["fp16"]), ("kd", ["fp32"])]
)
def test_losses_are_those_without_a_cache(
    method: str, dtypes: list[str], keys: dict[str, Any], asked: list[int], tmp_path: Path
) -> None:
    """In epochs that fill it, and in those that read it, in which the teacher does not run."""
    common = keys | {"method": method, "accumulate": 2}
    assert run(tmp_path / "off", **common) == 0
    assert asked == []
    for dtype in dtypes:
        assert run(tmp_path / dtype, **common, teacher_cache="memory", teacher_cache_dtype=dtype) == 0
        close(tmp_path / dtype, tmp_path / "off", 1e-6 if dtype == "fp32" else 1e-3)
        assert asked == [0] * 72 + [1] * 72
        asked.clear()


def test_the_cycle_begins_where_the_teacher_is_first_asked(
    keys: dict[str, Any], asked: list[int], tmp_path: Path
) -> None:
    common = keys | {"method": "at", "at_start_epoch": 1, "epochs": 5}
    assert run(tmp_path / "off", **common) == 0
    assert run(tmp_path / "run", **common, teacher_cache="memory", teacher_cache_dtype="fp32") == 0
    close(tmp_path / "run", tmp_path / "off", 1e-6)
    assert asked == [1] * 72 + [2] * 72


def test_files_some_of_which_cannot_be_read(keys: dict[str, Any], asked: list[int], tmp_path: Path) -> None:
    """Whoever stands in for an image is not taken for it: the teacher sees such batches each time."""
    images = make_folders(tmp_path / "images", train=8)
    (images / "train/bee/3.png").write_bytes(b"")
    torch.manual_seed(1)
    weights = tmp_path / "teacher.pt"
    from models import create

    torch.save(create("wrn-10-2", 3).state_dict(), weights)
    common = keys | {"teacher_checkpoint": weights, "dataset": "imagefolder", "data_dir": images}
    common |= {"image_size": 16, "batch_size": 8, "limit_train": "null", "limit_test": "null"}
    assert run(tmp_path / "off", **common) == 0
    assert run(tmp_path / "run", **common, teacher_cache=tmp_path / "c", teacher_cache_dtype="fp32") == 0
    close(tmp_path / "run", tmp_path / "off", 1e-6)
    assert asked.count(0) == asked.count(1) == 24
    assert 8 <= asked.count(3) <= 24  # its batch; and what its place in the filling epoch left out


# --- the same bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_run_that_is_cut_has_the_same_bits(
    where: str,
    keys: dict[str, Any],
    kept: Path,
    asked: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of epochs that fill and of such that read; what memory has lost is made as it was."""
    kind = where if where == "memory" else tmp_path / "cache"
    for steps in (2, 4, 6, 10, None):
        limit = {} if steps is None else {"max_steps": steps}
        assert run(tmp_path / "run", **keys, **limit, teacher_cache=kind) == 0
        told = json.loads((tmp_path / "run/summary.json").read_text())["teacher_test_error"]
        assert told == json.loads((kept / "run/summary.json").read_text())["teacher_test_error"]
        if steps == 6 and where == "memory":  # also while it is made again
            with monkeypatch.context() as patch:
                patch.setattr(distributed.StopRequest, "poll", lambda self: signal.SIGTERM)
                assert run(tmp_path / "run", **keys, teacher_cache=kind) == 128 + signal.SIGTERM
                assert len(metrics(tmp_path / "run")) == 2
    assert same(tmp_path / "run", kept / "run")
    assert (len(asked) == 2 * 72) is (where == "folder")


def test_a_full_cache_serves_another_student(
    keys: dict[str, Any], kept: Path, asked: list[int], tmp_path: Path
) -> None:
    before = (kept / "cache/records.bin").read_bytes()
    common = keys | {"teacher_cache": kept / "cache"}
    assert run(tmp_path / "again", **common) == 0
    assert same(tmp_path / "again", kept / "run")
    assert run(tmp_path / "other", **common, student="wrn-16-1", batch_size=24, epochs=1) == 0
    assert asked == []
    assert (kept / "cache/records.bin").read_bytes() == before


def test_damaged_rows_are_made_again(
    keys: dict[str, Any], kept: Path, asked: list[int], tmp_path: Path
) -> None:
    """As a power failure leaves them, or a bad disk: a third is lost, one bit of a row has changed."""
    shutil.copytree(kept / "cache", tmp_path / "cache")
    path = tmp_path / "cache/records.bin"
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    content[len(content) - 1000] ^= 1
    path.write_bytes(content)
    assert run(tmp_path / "run", **keys, teacher_cache=tmp_path / "cache") == 0
    assert same(tmp_path / "run", kept / "run")
    assert set(asked) == {0, 1}
    assert path.read_bytes() == (kept / "cache/records.bin").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, call",
    [
        ("trainer.teacher_cache.records._reserve", 1),
        ("trainer.teacher_cache.records.write_atomically", 1),
        ("os.pwrite", 1),
        ("os.pwrite", 70),
        ("os.pwrite", 100),
    ],
)
def test_killed_while_it_is_written(
    target: str, call: int, keys: dict[str, Any], kept: Path, tmp_path: Path
) -> None:
    words = flags(KEYS | dashed(keys | {"teacher_cache": tmp_path / "c"}) | {"output-dir": tmp_path / "run"})

    def work() -> int:
        whole = os.pwrite
        # A write is cut short by a byte more each time, the fatal one among them.
        os.pwrite = lambda file, content, place: (
            whole(file, content[: len(content) // 2], place) and whole(file, content, place)
        )
        fatal(target, call)
        return train.main(words)

    assert code_of(in_a_child(work)) == -signal.SIGKILL, "the moment never came"
    assert train.main(words) == 0
    assert same(tmp_path / "run", kept / "run")


def test_a_row_counts_when_it_is_whole(tmp_path: Path) -> None:
    """Cut at any byte, or written by another header, it is not there."""
    shape, rows = (2, 3, 8), torch.arange(1, 9, dtype=torch.uint8)[None]
    header = {"format": 1}
    place = torch.tensor([1])
    records.create(tmp_path / "c", header, shape)
    records.InFolder(tmp_path / "c", header, shape).write(1, place, rows)
    path = tmp_path / "c" / records.RECORDS
    content = path.read_bytes()
    start = content.index(bytes(range(1, 9)))
    assert start == 4 * 12
    for cut in range(12):
        path.write_bytes(content[: start + cut] + bytes(len(content) - start - cut))
        found = records.InFolder(tmp_path / "c", header, shape)
        assert not found.known(1, place)
        found.write(1, place, rows)
        assert found.known(1, place)
        assert torch.equal(found.read(1, place), rows)
    assert not records.InFolder(tmp_path / "c", {"format": 2}, shape).known(1, place)


# --- what is refused ----------------------------------------------------------------------------------


def test_a_cache_of_something_else_is_refused(
    keys: dict[str, Any], kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(keys["teacher_checkpoint"], weights_only=True)
    torch.save(state | {"fc.bias": state["fc.bias"] + 1e-3}, tmp_path / "replaced.pt")
    before = (kept / "cache/records.bin").read_bytes()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "seed 0, now 1"),
        ({"augment_cycle": 3}, "augment-cycle 2, now 3"),
        ({"taps": "group3"}, "maps "),
        ({"p": 1}, "p 2.0, now 1.0"),
        ({"method": "kd"}, "maps "),
        ({"amp": "bf16"}, "amp none, now bf16"),
        ({"limit_train": 71}, "limit-train 72, now 71"),
        ({"teacher_cache_dtype": "bf16"}, "teacher-cache-dtype fp16, now bf16"),
        ({"teacher_checkpoint": tmp_path / "replaced.pt"}, "other teacher's weights"),
    ]
    capsys.readouterr()
    for change, words in changes:
        code = run(tmp_path / "new", **keys | {"teacher_cache": kept / "cache"} | change)
        check_refusal(code, capsys, f"teacher-cache {kept / 'cache'} was made for something else", words)
        assert not (tmp_path / "new").exists()
    assert (kept / "cache/records.bin").read_bytes() == before


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: os.truncate(folder / "records.bin", 1000), "has 1,000 of "),
        (lambda folder: (folder / "records.bin").unlink(), "No such file"),
        (lambda folder: os.truncate(folder / "header.json", 30), "header.json is damaged"),
        (lambda folder: (folder / "header.json").rename(folder / "mine.txt"), "other files (mine.txt)"),
    ],
)
def test_damaged_folders_are_refused(
    damage: Callable[[Path], Any],
    words: str,
    keys: dict[str, Any],
    kept: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(kept / "cache", tmp_path / "cache")
    damage(tmp_path / "cache")
    capsys.readouterr()
    check_refusal(run(tmp_path / "new", **keys, teacher_cache=tmp_path / "cache"), capsys, words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"method": "hints"}, ["teacher-cache memory", "at, kd, at+kd", "hints"]),
        ({"method": "none"}, ["teacher-cache memory", "not for method none"]),
        ({"augment_cycle": 0}, ["teacher-cache memory needs augment-cycle"]),
        ({"cutmix": 1}, ["teacher-cache memory", "mixup or cutmix"]),
        ({"normalize": "none"}, ["teacher-cache-dtype fp16", "normalize none"]),
        ({"teacher_cache": ""}, ["teacher-cache", "is empty"]),
        ({"teacher_cache_dtype": "fp8"}, ["teacher-cache-dtype", "fp8"]),
    ],
)
def test_keys_that_do_not_go_together(
    change: dict[str, Any],
    words: list[str],
    keys: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    check_refusal(run(tmp_path / "new", **keys | {"teacher_cache": "memory"} | change), capsys, *words)


def test_off_may_be_written_as_yaml_reads_it() -> None:
    assert make_config({"student": "wrn-10-1", "teacher-cache": False}, to_print=True).teacher_cache == "off"


# --- what does not stop a run -------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["posix_fallocate", "pwrite"])
def test_a_full_disk(
    target: str,
    keys: dict[str, Any],
    kept: Path,
    asked: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, calls = getattr(os, target), iter(range(10**6))

    def full(*args: Any) -> Any:
        if target == "posix_fallocate" or next(calls) >= 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(os, target, full)
    capsys.readouterr()
    assert run(tmp_path / "run", **keys, teacher_cache=tmp_path / "cache") == 0
    out, err = capsys.readouterr()
    assert f"warning: teacher-cache {tmp_path / 'cache'}: No space left on device" in out + err
    assert (out + err).count("No space left") == 1
    close(tmp_path / "run", kept / "run", 1e-5)
    assert len(asked) > 2 * 72


def test_memory_that_is_not_there(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache.os, "sysconf", lambda name: 1)
    capsys.readouterr()
    code = run(tmp_path / "new", **keys, teacher_cache="memory")
    check_refusal(code, capsys, "teacher-cache memory: ", "lower augment-cycle")


# --- many ranks ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks, where", [(2, "memory"), (4, "folder")])
def test_ranks_share_it(ranks: int, where: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """What one rank made another reads: the losses and weights are those of one rank, also if it is cut."""
    common = KEYS | keys | {"freeze_bn": "true", "precision": "fp64", "lr": 1e-3, "limit_train": 71}
    common["teacher_cache_dtype"] = "fp32"
    folders = [tmp_path / "alone", tmp_path / "ranks"]
    assert train.main(flags(dashed(common) | {"teacher-cache": "memory", "output-dir": folders[0]})) == 0
    kind = where if where == "memory" else tmp_path / "cache"
    for limit in ({"max_steps": 8}, {}):
        done = fork_ranks(ranks, folders[1], **common, teacher_cache=kind, **limit)
        assert done.returncode == 0, done.stderr
    (expected_lines, expected), (lines, weights) = map(results, folders)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-6)
    for line, theirs in zip(lines, expected_lines, strict=True):
        assert line["at_loss"] == pytest.approx(theirs["at_loss"], rel=1e-6)


def test_the_digest_is_that_of_the_weights_as_loaded(keys: dict[str, Any], kept: Path) -> None:
    """Which folding changes: a cache is known again by the teacher's file, not by how it was run."""
    from models import create

    teacher = create("wrn-10-2")
    teacher.load_state_dict(torch.load(keys["teacher_checkpoint"], weights_only=True))
    header = json.loads((kept / "cache/header.json").read_text())
    assert header["teacher's weights"] == checkpoint.digest(teacher)
