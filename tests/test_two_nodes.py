"""Two torchrun agents, as on two nodes, joined by fixed addresses or by elastic rendezvous."""

from __future__ import annotations

import random
import socket
import subprocess
from pathlib import Path

import pytest
from test_trainer_distributed import ENVIRONMENT, ROOT, command, launch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rendezvous(kind: str, node: int, port: int) -> list[str]:
    if kind == "static":
        return ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    identity = f"--rdzv-id={random.Random(port).randint(0, 10**6)}"
    return ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", identity]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "elastic"])
def test_two_agents_train_what_two_ranks_train(kind: str, tmp_path: Path) -> None:
    keys = {"epochs": 1, "freeze_bn": "false"}
    together = launch(2, tmp_path / "together", **keys)
    assert together.returncode == 0, together.stderr
    port, agents = free_port(), []
    for node in range(2):
        line = command(1, tmp_path / "apart", **keys)
        place = line.index("--standalone")
        line[place : place + 1] = rendezvous(kind, node, port)
        pipe = subprocess.PIPE
        agents.append(subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True))
    outputs = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs[0][1] + outputs[1][1]
    assert sum(out.count("epoch 1/1") for out, _ in outputs) == 1, "one rank of all speaks"
    a, b = ((tmp_path / name / "model.pt").read_bytes() for name in ("together", "apart"))
    assert a == b
