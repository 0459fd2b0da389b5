"""Data parallel over gloo: the same training, to rounding, for 1, 2 and 4 ranks."""

from __future__ import annotations

import gc
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from runs import (
    DISTRIBUTED,
    ENVIRONMENT,
    command,
    flags,
    fork_ranks,
    make_folders,
    results,
    wait_until,
)
from torch.nn.parallel import DistributedDataParallel

import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of a student and a teacher whose BatchNorms know their inputs: frozen, they need that."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("wrn-10-1", "wrn-10-2"):
        values = DISTRIBUTED | {"student": name, "lr": 0.05, "freeze-bn": "false"}
        assert train.main(flags(values | {"output-dir": folder / name})) == 0
    return {name: folder / name / "model.pt" for name in ("wrn-10-1", "wrn-10-2")}


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("fp64", 1e-10)])
def test_any_number_of_ranks_trains_the_same(
    precision: str, tolerance: float, trained: dict[str, Path], tmp_path: Path
) -> None:
    """Five epochs, 20 steps, AT and KD included; the authors' code had a beta that grew with the ranks."""
    keys = {"method": "at+kd", "teacher": "wrn-10-2", "teacher_checkpoint": trained["wrn-10-2"]}
    keys |= {"pretrained": trained["wrn-10-1"], "precision": precision, "epochs": 5}
    for ranks in (1, 2, 4):
        done = fork_ranks(ranks, tmp_path / str(ranks), **keys)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 5/5") == 1  # one rank speaks
    alone_lines, alone = results(tmp_path / "1")
    start = torch.load(trained["wrn-10-1"], weights_only=True)
    moved = max((alone[name] - start[name]).abs().max().item() for name in alone)
    assert moved > 1e-2  # so that the tolerance says something
    for ranks in ("2", "4"):
        lines, weights = results(tmp_path / ranks)
        for name, expected in alone.items():
            torch.testing.assert_close(weights[name], expected, rtol=tolerance, atol=tolerance)
        for line, expected_line in zip(lines, alone_lines, strict=True):
            for key in ("train_loss", "ce_loss", "at_loss", "kd_loss", "train_error", "test_error", "lr"):
                assert line[key] == pytest.approx(expected_line[key], rel=tolerance), key
    events = [path for path in (tmp_path / "4").iterdir() if path.name.startswith("events")]
    assert len(events) == 1  # one rank writes


@pytest.mark.slow
def test_compiled_ranks_train_the_same(trained: dict[str, Path], tmp_path: Path) -> None:
    keys = {"method": "at+kd", "teacher": "wrn-10-2", "teacher_checkpoint": trained["wrn-10-2"]}
    keys |= {"pretrained": trained["wrn-10-1"], "channels_last": "true"}
    # Sizes of test_trainer's compiled run, so that the compiler's cache may serve both.
    keys |= {"limit_train": 64, "batch_size": 32, "limit_test": 32, "test_batch_size": 16}
    for ranks, compiled in ((1, "false"), (2, "true")):
        done = fork_ranks(ranks, tmp_path / compiled, **keys, compile=compiled)
        assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    (lines, weights), (expected_lines, expected) = (results(tmp_path / name) for name in ("true", "false"))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-5)
    assert lines[1]["at_loss"] == pytest.approx(expected_lines[1]["at_loss"], rel=1e-5)


@pytest.mark.slow
def test_stopped_ranks_resume_together(tmp_path: Path) -> None:
    """SIGTERM to the launcher, and the continuation by as many ranks is bitwise the undisturbed run."""
    keys = {"epochs": 12, "freeze_bn": "false", "checkpoint_every": 3}
    whole = fork_ranks(2, tmp_path / "whole", **keys)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "stopped"
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        command(2, folder, **keys), cwd=ROOT, env=ENVIRONMENT, stdout=quiet, stderr=quiet
    )
    wait_until((folder / "checkpoint.pt").exists, process)
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    assert not (folder / "model.pt").exists()
    resumed = fork_ranks(2, folder, **keys)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing from step" in resumed.stdout
    assert "FutureWarning" not in resumed.stderr
    assert (folder / "model.pt").read_bytes() == (tmp_path / "whole/model.pt").read_bytes()
    timing = {"seconds", "images_per_second"}
    first, second = (
        [{k: v for k, v in line.items() if k not in timing} for line in results(tmp_path / name)[0]]
        for name in ("whole", "stopped")
    )
    assert first == second


@pytest.mark.slow
def test_each_rank_resumes_with_its_own_statistics(tmp_path: Path) -> None:
    """Which enter the loss here; a test in between, by the statistics of rank 0, leaves them alone."""
    keys = {"method": "min-l2", "gradient_bn": "running", "freeze_bn": "false", "lr": 0.01}
    keys |= {"checkpoint_every": 1}
    for folder, steps in (("whole", None), ("stopped", 3), ("stopped", 6), ("stopped", None)):
        done = fork_ranks(2, tmp_path / folder, **keys, **({"max_steps": steps} if steps else {}))
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "stopped/model.pt").read_bytes() == (tmp_path / "whole/model.pt").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken, message",
    [
        (
            ["ant/0", "ant/1", "ant/2", "bee/0", "bee/1", "bee/2", "cat/0", "cat/1", "cat/2"],
            "no image of the",
        ),
        (["ant/0", "cat/2"], "2 images can't be read, such as"),
    ],
    ids=["all", "one of each rank"],
)
def test_ranks_agree_on_what_they_could_not_read(broken: list[str], message: str, tmp_path: Path) -> None:
    images = make_folders(tmp_path / "images", train=4)
    for name in broken:
        (images / "val" / f"{name}.png").write_bytes(b"")
    keys = {"dataset": "imagefolder", "data_dir": images, "image_size": 16, "batch_size": 4, "epochs": 1}
    keys |= {"limit_train": 12, "limit_test": 9, "max_unreadable": 1 if len(broken) == 2 else 20}
    done = fork_ranks(2, tmp_path / "run", **keys)
    assert done.returncode
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.slow
def test_a_tail_smaller_than_the_ranks_is_refused(tmp_path: Path) -> None:
    done = fork_ranks(4, tmp_path / "run", limit_train=130)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert lines == [
        "train.py: error: batch-size 64: a batch of 2 images (of 130) cannot be shared by 4 ranks"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("keys, code", [({}, 0), ({"lr": 1e30}, 1)], ids=["finished", "diverged"])
def test_ddp_is_gone_before_the_ranks_part(keys: dict[str, Any], code: int, tmp_path: Path) -> None:
    """Otherwise a run now and then never ends: see `trainer.distributed.ranks`."""
    destroy = torch.distributed.destroy_process_group

    def watched() -> None:
        ddp = [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
        print("alive:", len(ddp))
        destroy()

    def main(words: list[str]) -> int:
        torch.distributed.destroy_process_group = watched
        code = train.main(words)
        print("code:", code)
        return code

    done = fork_ranks(2, tmp_path / "run", main, limit_train=64, epochs=2, **keys)
    assert done.stdout.count("alive: 0") == 2, done.stdout + done.stderr
    assert done.stdout.count(f"code: {code}") == 2


@pytest.mark.parametrize("count", [1, 2])
def test_ranks_of_one_process_need_no_launcher(count: int, tmp_path: Path) -> None:
    assert train.main(flags(DISTRIBUTED | {"output-dir": tmp_path / "run", "epochs": count})) == 0
    assert len(results(tmp_path / "run")[0]) == count
