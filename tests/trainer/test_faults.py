"""What can go wrong around a run: checkpoints damaged in any way, disks that are full or read-only."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from runs import SMALL, Forked, code_of, dashed, flags, forked, in_a_child, make_folders, metrics, wait_until
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import train
from trainer import checkpoint, distributed, run_folder
from trainer.data import in_memory, workers
from trainer.errors import ConfigError, RankError
from trainer.run import Run

KEYS = {**SMALL, "device": "cpu", "epochs": 2, "checkpoint-every": 1}  # 8 steps


def run(folder: Path, **keys: Any) -> int:
    values = KEYS | dashed(keys) | {"output-dir": folder}
    return train.main(flags(values))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    assert not (folder / run_folder.PREVIOUS).exists(), "a finished run keeps one checkpoint"
    return folder


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a signal ended at its 6th step: its checkpoints are of the steps 6 and 5."""
    folder, polls = tmp_path_factory.mktemp("stopped") / "run", iter(range(1, 99))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.StopRequest, "poll", lambda self: signal.SIGTERM * (next(polls) == 6))
        assert run(folder) == 128 + signal.SIGTERM
    for name, step in ((run_folder.CHECKPOINT, 6), (run_folder.PREVIOUS, 5)):
        assert torch.load(folder / name, weights_only=True)["progress"]["step"] == step
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- damaged checkpoints ----------------------------------------------------------------------------


class Hostile:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    """In the middle of the weights, where nothing but a checksum notices."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def folder_bit(path: Path) -> None:
    """The zip file's directory calls a tensor a folder, of which torch would read nothing."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
        for entry in archive.infolist():
            if entry.filename.endswith("data/0"):
                content[place + 38] ^= 0x10
            place += 46 + len(entry.filename.encode()) + len(entry.extra) + len(entry.comment)
    path.write_bytes(content)


def foreign(path: Path) -> None:
    torch.save([1, 2], path)


def hostile(path: Path) -> None:
    torch.save({"model": Hostile(path.with_name("executed"))}, path)


def hostile_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(path.with_name("executed"))))


each_damage = pytest.mark.parametrize(
    "damage", [cut, empty, flip_a_bit, folder_bit, foreign, hostile, hostile_pickle]
)


@each_damage
def test_damaged_checkpoint_is_refused(
    damage: Callable[[Path], None], stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With none to fall back to: one line, nothing executed, nothing changed."""
    (stopped / run_folder.PREVIOUS).unlink()
    damage(stopped / run_folder.CHECKPOINT)
    before = contents(stopped)
    capsys.readouterr()
    assert run(stopped) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(stopped / run_folder.CHECKPOINT) in error
    assert contents(stopped) == before


def test_cut_anywhere(whole: Path, tmp_path: Path) -> None:
    content = (whole / run_folder.CHECKPOINT).read_bytes()
    for size in (*range(0, len(content), len(content) // 40), len(content) - 1):
        (tmp_path / "cut.pt").write_bytes(content[:size])
        with pytest.raises(ConfigError, match=r"cut\.pt is damaged, truncated or not a checkpoint"):
            checkpoint.load(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    "key, value",
    [
        ("optimizer", torch.zeros(2)),
        ("progress", {"step": "6"}),
        ("progress", {"history": 3}),
        ("ranks", 3),
        ("ranks", []),
        ("ranks", [{}]),
        ("model", []),
    ],
)
def test_a_checkpoint_of_strange_content(key: str, value: Any, stopped: Path, capsys) -> None:
    state = checkpoint.load(stopped / run_folder.CHECKPOINT)
    checkpoint.save(stopped / run_folder.CHECKPOINT, state | {key: value})
    capsys.readouterr()
    assert run(stopped) == 2
    error = capsys.readouterr().err
    assert "does not fit this run" in error
    assert error.count("\n") == 1


def test_other_images_than_the_run_has_begun_with(tmp_path: Path, capsys) -> None:
    """More of them, or others: an epoch would be of another length, or images be seen twice."""
    make_folders(tmp_path / "images", train=4, val=1)
    keys = {"dataset": "imagefolder", "data_dir": tmp_path / "images", "image_size": 16, "batch_size": 4}
    keys |= {"limit_train": 12, "limit_test": 3}
    assert run(tmp_path / "run", **keys, max_steps=2) == 0
    first = tmp_path / "images/train/ant/0.png"
    first.rename(first.with_name("9.png"))
    capsys.readouterr()
    assert run(tmp_path / "run", **keys) == 2
    error = capsys.readouterr().err
    assert "holds different images from those this run began with (other files or labels)" in error
    first.with_name("9.png").rename(first)
    assert run(tmp_path / "run", **keys) == 0


def test_a_continued_run_knows_its_last_good_checkpoint(stopped: Path, monkeypatch, capsys) -> None:
    poison(monkeypatch, 1)
    assert run(stopped) == 1
    assert f"last good checkpoint: {stopped / run_folder.CHECKPOINT} (step 6)" in capsys.readouterr().err


@each_damage
def test_fallback_to_the_checkpoint_before(
    damage: Callable[[Path], None], stopped: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(stopped / run_folder.CHECKPOINT)
    capsys.readouterr()
    assert run(stopped) == 0
    output = capsys.readouterr().out
    assert "continuing from the checkpoint before it" in output
    assert "continuing from step 5 of 8" in output
    assert not (stopped / "executed").exists()
    assert (stopped / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()
    assert metrics(stopped) == metrics(whole)


def test_both_checkpoints_damaged(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (run_folder.CHECKPOINT, run_folder.PREVIOUS):
        flip_a_bit(stopped / name)
    before = contents(stopped)
    capsys.readouterr()
    assert run(stopped) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(stopped) == before


def test_killed_between_the_renames_of_a_save(stopped: Path, whole: Path) -> None:
    """The previous checkpoint alone: the run goes on from it."""
    (stopped / run_folder.CHECKPOINT).unlink()
    assert run(stopped) == 0
    assert (stopped / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()


def test_killed_before_the_save_that_follows_a_link(tmp_path: Path) -> None:
    """The latest and the one before it are then one file; renaming a third name of it does nothing."""
    checkpoint.save_latest(tmp_path, {"step": 1})
    os.link(tmp_path / run_folder.CHECKPOINT, tmp_path / run_folder.PREVIOUS)
    checkpoint.save_latest(tmp_path, {"step": 2})
    steps = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {run_folder.CHECKPOINT: 2, run_folder.PREVIOUS: 1}


def test_the_good_checkpoint_survives_until_there_is_another(stopped: Path, monkeypatch) -> None:
    """Fallen back, the damaged latest must not take the place of the good previous one."""
    flip_a_bit(stopped / run_folder.CHECKPOINT)
    good = (stopped / run_folder.PREVIOUS).read_bytes()
    monkeypatch.setattr(distributed.StopRequest, "poll", lambda self: os._exit(9))
    assert code_of(in_a_child(lambda: run(stopped))) == 9
    assert (stopped / run_folder.PREVIOUS).read_bytes() == good


# --- disks ------------------------------------------------------------------------------------------


def start(folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return forked(["train.py", *flags(KEYS | {"output-dir": folder})], **options)


def check_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr[-2000:]
    assert result.stderr.count("\n") == 1, result.stderr[-2000:]
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.slow
def test_a_checkpoint_that_can_not_be_written(stopped: Path, whole: Path) -> None:
    """A limit on the size of files stands in for a full disk: the checkpoint before is intact, and serves."""
    before = (stopped / run_folder.CHECKPOINT).read_bytes()
    limit = len(before) // 2
    result = start(
        stopped, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    )
    check_one_line(result, f"cannot write {stopped / run_folder.CHECKPOINT}", "is intact")
    assert (stopped / run_folder.CHECKPOINT).read_bytes() == before
    assert run(stopped) == 0
    assert (stopped / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 3 MiB in memory, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_full_disk(small_disk: Path) -> None:
    """With room for one checkpoint and not for three: a clear end, and what is there can be read."""
    folder = small_disk / "run"
    room = 3 * 2**20 - 1024 * 1024
    (small_disk / "ballast").write_bytes(b"0" * room)
    result = start(folder)
    check_one_line(result, "cannot write", "No space left on device")
    kept = [name for name in (run_folder.CHECKPOINT, run_folder.PREVIOUS) if (folder / name).exists()]
    for name in kept:
        checkpoint.load(folder / name)
    (small_disk / "ballast").unlink()
    assert start(folder).returncode == 0


@pytest.mark.slow
def test_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    check_one_line(start(small_disk / "run"), "output-dir", "Read-only file system")


def refuse(*arguments: Any) -> None:
    raise OSError(30, "Read-only file system")


def test_disk_that_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """TensorBoard is the first to notice, then the checkpoint before the latest."""
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "flush", refuse)
        assert run(tmp_path / "run") == 2
    assert "cannot write TensorBoard's events: Read-only file system" in capsys.readouterr().err
    checkpoint.save_latest(tmp_path, {})
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(ConfigError, match=r"Read-only file system \(checkpoint.pt is intact\)"):
        checkpoint.save_latest(tmp_path, {})


def test_a_file_is_on_the_disk_before_its_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may lose whatever is not yet flushed, renames included."""
    path, done = tmp_path / "a", []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        there = {os.stat(found).st_ino: found for found in (tmp_path, *tmp_path.iterdir())}
        synced = there[os.fstat(handle).st_ino]
        done.append(("sync", "folder" if synced == tmp_path else synced.read_bytes(), path.read_bytes()))
        sync(handle)

    def rename(old: Path, new: Path) -> None:
        done.append(("rename", Path(old).parent == tmp_path, Path(new) == path))
        replace(old, new)

    checkpoint.write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    checkpoint.write_atomically(path, b"new")
    assert done == [("sync", b"new", b"old"), ("rename", True, True), ("sync", "folder", b"new")]


@pytest.mark.parametrize("links", [True, False])
def test_the_previous_checkpoint_is_what_the_latest_was(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file, under its second name; a copy where the file system has no hard links."""
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    latest, previous = tmp_path / run_folder.CHECKPOINT, tmp_path / run_folder.PREVIOUS
    checkpoint.save_latest(tmp_path, {"step": 1})
    file, content = latest.stat().st_ino, latest.read_bytes()
    checkpoint.save_latest(tmp_path, {"step": 2})
    assert (previous.stat().st_ino == file) is links
    assert previous.read_bytes() == content
    assert checkpoint.load(latest) == {"step": 2}
    assert {path.name for path in tmp_path.iterdir()} == {run_folder.CHECKPOINT, run_folder.PREVIOUS}


# --- who speaks, and when ----------------------------------------------------------------------------


def test_interrupted_outside_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """While the teacher is tested, say; between steps the training answers itself."""

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train", interrupt)
    assert run(tmp_path / "run") == 130
    assert capsys.readouterr().err == "train.py: error: interrupted\n"


@pytest.mark.parametrize("error, speaks", [(ConfigError, False), (RankError, True)])
def test_one_rank_speaks_for_all_but_of_its_own(
    error: type[ConfigError], speaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fail(*arguments: Any) -> None:
        raise error("wrong")

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("trainer.run.train", fail)
    assert run(tmp_path / "run") == 2
    assert capsys.readouterr().err == ("train.py: error: wrong\n" if speaks else "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="workers tell signals apart on Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_stops_the_run_alone(number: signal.Signals, tmp_path: Path) -> None:
    """As torchrun, Slurm and a closed terminal send it: loading goes on until the checkpoint is written."""
    make_folders(tmp_path / "images", train=40)
    keys = {"dataset": "imagefolder", "data-dir": tmp_path / "images", "image-size": 16, "workers": 2}
    values = KEYS | keys | {"limit-test": 3, "epochs": 10**6, "batch-size": 4, "output-dir": tmp_path / "run"}
    values |= {"limit-train": 120, "lr-schedule": "constant", "lr": 1e-3}
    how = subprocess.Popen if number == signal.SIGTERM else Forked
    process = how(
        [sys.executable, "train.py", *flags(values)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until((tmp_path / "run" / run_folder.CHECKPOINT).exists, process)
    os.killpg(process.pid, number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert f"stopped by signal {int(number)} at step" in output
    assert error == ""
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left
    checkpoint.load(tmp_path / "run" / run_folder.CHECKPOINT)


# --- figures that are not finite, memory that does not suffice --------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """One pixel of the batches of these steps (counted from 1) is NaN."""
    taken = iter(range(1, 999))
    clean = in_memory.training_batch

    def batch(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = clean(*arguments)
        if next(taken) in steps:
            images[0, 0, 0, 0] = torch.nan
        return images, labels

    monkeypatch.setattr(in_memory, "training_batch", batch)


def test_a_step_that_is_not_finite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 6)
        assert run(folder) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "not finite at step 6: loss, CE, gradient of conv.weight" in error
    assert f"last good checkpoint: {folder / run_folder.CHECKPOINT} (step 5)" in error
    assert run(folder) == 0, "which can be continued from"
    assert "continuing from step 5" in capsys.readouterr().out


def test_skipped_steps_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Weights, momentum and BatchNorm's statistics are those of a run that never saw the batch."""
    assert run(tmp_path / "short", max_steps=7, skip_nonfinite="true") == 0
    with monkeypatch.context() as patch:
        poison(patch, 8)
        assert run(tmp_path / "skipped", skip_nonfinite="true") == 0
    assert "step 8: skipped" in capsys.readouterr().out
    states = [
        torch.load(tmp_path / name / run_folder.CHECKPOINT, weights_only=True)
        for name in ("short", "skipped")
    ]
    kept = [(state["model"], state["optimizer"]["state"]) for state in states]
    torch.testing.assert_close(*kept, rtol=0, atol=0)
    with monkeypatch.context() as patch:
        poison(patch, *range(1, 99))
        assert run(tmp_path / "never", skip_nonfinite="true") == 1
    assert "every step of epoch 1 was skipped" in capsys.readouterr().err


def test_fp16_overflow_is_left_to_the_loss_scaling(tmp_path: Path) -> None:
    """The scale starts at 65,536: gradients are infinite until it has come down, and the run goes on."""
    assert run(tmp_path / "run", amp="fp16", lr=0.01) == 0
    state = torch.load(tmp_path / "run" / run_folder.CHECKPOINT, weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    monkeypatch.setattr(in_memory, "training_batch", full)
    assert run(tmp_path / "run", accumulate=2) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "out of memory with 32 images at a time (batch-size 64, 1 ranks, accumulate 2)" in error
    assert "Tried to allocate 2.00 GiB" in error


# --- data workers that end before the training ------------------------------------------------------


def loading(folder: Path, **keys: Any) -> subprocess.Popen[str]:
    """train.py on image files, for as long as one likes, with two data workers."""
    make_folders(folder / "images", train=40)
    values = KEYS | {"dataset": "imagefolder", "data-dir": folder / "images", "image-size": 16, "workers": 2}
    values |= {"limit-test": 3, "epochs": 10**6, "batch-size": 4, "output-dir": folder / "run"}
    values |= {"limit-train": 120, "lr-schedule": "constant", "lr": 1e-3} | dashed(keys)
    line = [sys.executable, str(ROOT / "train.py"), *flags(values)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return Forked(line, cwd=ROOT, **pipes)  # type: ignore[call-overload]


def children(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how torch hears of it elsewhere differs")
def test_a_killed_data_worker(tmp_path: Path) -> None:
    """As the system kills for lack of memory: one line, exit code 1, and the checkpoint serves."""
    process = loading(tmp_path)
    wait_until((tmp_path / "run" / run_folder.CHECKPOINT).exists, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    (line,) = error.splitlines()
    assert line.startswith("train.py: error: data worker ")
    # torch sees the signal or, where it looks first, only that the worker is gone
    killed = "was killed, as the system does when memory runs out"
    assert re.search(rf" ({killed}|has ended, perhaps for lack of memory): fewer workers \(now 2\) or", line)
    assert line.endswith("resume auto continues from the last checkpoint")
    step = checkpoint.load(tmp_path / "run" / run_folder.CHECKPOINT)["progress"]["step"]
    process = loading(tmp_path / "again", output_dir=tmp_path / "run", max_steps=step + 1)
    output, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert f"continuing from step {step} of {step + 1}" in output


LOST = [
    ConnectionResetError(104, "Connection reset by peer"),
    EOFError(),
    FileNotFoundError(2, "No such file"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_worker_that_dies_as_it_hands_over(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then torch raises what its socket does."""

    def broken(loader: object) -> Any:
        raise error
        yield

    monkeypatch.setattr(DataLoader, "__iter__", broken)
    make_folders(tmp_path / "images")
    keys = {"dataset": "imagefolder", "data_dir": tmp_path / "images", "image_size": 16, "workers": 2}
    assert run(tmp_path / "run", **keys, limit_train=24, limit_test=9) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a data worker has ended, perhaps for lack of memory: fewer workers (now 2) or a smaller" in line


def test_what_a_worker_raises_is_no_loss_of_it() -> None:
    def batches() -> Any:
        yield 1
        raise EOFError("Caught EOFError in DataLoader worker process 0.")

    with pytest.raises(EOFError, match="Caught"):
        list(workers.connected(batches()))


@pytest.mark.slow
def test_shared_memory_that_is_full(tmp_path: Path) -> None:
    """Workers hand images over through it, and Docker gives it 64 MB: the run ends, and does not wait."""
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "bash", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of their own")
    make_folders(tmp_path / "images")
    keys = KEYS | {"dataset": "imagefolder", "data-dir": tmp_path / "images", "workers": 2, "max-steps": 2}
    keys |= {"limit-train": 24, "limit-test": 9, "image-size": 128, "output-dir": tmp_path / "run"}
    command = f'{mount} && exec "$@"'
    line = ["unshare", "-m", "bash", "-c", command, "bash", sys.executable, "train.py", *flags(keys)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1, result.stderr
    (told,) = result.stderr.splitlines()
    assert "a data worker can't hand over its images, as the shared memory is full (/dev/shm; " in told
    assert "fewer workers (now 2) or a smaller batch-size need less" in told


@pytest.mark.parametrize(
    "message, told",
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ", "/dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", "signal: Segmentation fault"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "worker 7, 8 has ended, perhaps for lack of"),
        (
            "DataLoader worker (pid 7) exited unexpectedly with exit code 3. Details",
            "perhaps for lack of mem",
        ),
        ("one of the variables needed for gradient computation", None),
    ],
)
def test_other_ends_of_data_workers(
    message: str, told: str | None, tmp_path: Path, monkeypatch, capsys
) -> None:
    """In torch's words for them; another RuntimeError is none of ours, and stays what it is."""

    def fail(*arguments: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(Run, "train", fail)
    if told is None:
        with pytest.raises(RuntimeError, match="gradient computation"):
            run(tmp_path / "run")
        return
    assert run(tmp_path / "run", workers=2) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
