"""Two torchrun agents, as on two nodes, joined by fixed addresses or by elastic rendezvous."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from paths import ROOT
from runs import ENVIRONMENT, command, fork_ranks, free_port


@dataclass(frozen=True)
class Node:
    """Where an agent runs: what comes before its command, and the address at which the others find it."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two network namespaces with a cable between them: apart from it, neither sees the other.

    Where the system does not allow that, both are this machine.
    """
    names = [f"at-fused-{os.getpid()}-{node}" for node in range(2)]
    nodes = [
        Node(f"10.231.77.{node + 1}", ("ip", "netns", "exec", name), {"GLOO_SOCKET_IFNAME": "cable"})
        for node, name in enumerate(names)
    ]
    cable = [
        "link",
        "add",
        "cable",
        "netns",
        names[0],
        "type",
        "veth",
        "peer",
        "name",
        "cable",
        "netns",
        names[1],
    ]
    steps = [*(["netns", "add", name] for name in names), cable]
    for node, name in zip(nodes, names, strict=True):
        inside = ["-n", name]
        steps += [
            [*inside, "address", "add", f"{node.address}/24", "dev", "cable"],
            [*inside, "link", "set", "cable", "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        try:
            for step in steps:
                subprocess.run(["ip", *step], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            nodes = [Node(), Node()]
        yield nodes
    finally:
        for name in names:
            with suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def rendezvous(kind: str, number: int, nodes: list[Node], port: int) -> list[str]:
    first = nodes[0].address
    if kind == "static":
        return ["--nnodes=2", f"--node-rank={number}", f"--master-addr={first}", f"--master-port={port}"]
    identity = f"--rdzv-id={random.Random(port).randint(0, 10**6)}"
    # An agent would look up its host's name for both, which in a namespace leads nowhere.
    here = [f"--local-addr={nodes[number].address}", f"--rdzv-conf=is_host={number == 0}"]
    return ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={first}:{port}", identity, *here]


def train_on(nodes: list[Node], kind: str, folder: Path, **keys: object) -> list[str]:
    """What the agents of the nodes print; all must succeed."""
    port, agents = free_port(), []
    for number, node in enumerate(nodes):
        line = command(1, folder, **keys)
        place = line.index("--standalone")
        line[place : place + 1] = rendezvous(kind, number, nodes, port)
        environment = ENVIRONMENT | node.environment
        pipe = subprocess.PIPE
        agents.append(
            subprocess.Popen(
                [*node.prefix, *line], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
            )
        )
    outputs = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * len(nodes), "".join(err for _, err in outputs)
    return [out for out, _ in outputs]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that two ranks under one agent train."""
    folder = tmp_path_factory.mktemp("together")
    done = fork_ranks(2, folder, epochs=1, freeze_bn="false")
    assert done.returncode == 0, done.stderr
    return (folder / "model.pt").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "elastic"])
def test_two_agents_train_what_two_ranks_train(
    kind: str, nodes: list[Node], together: bytes, tmp_path: Path
) -> None:
    outputs = train_on(nodes, kind, tmp_path, epochs=1, freeze_bn="false")
    assert sum(out.count("epoch 1/1") for out in outputs) == 1, "one rank of all speaks"
    assert (tmp_path / "model.pt").read_bytes() == together
