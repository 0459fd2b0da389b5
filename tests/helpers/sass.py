"""Instructions per 16-byte vector of the CUDA kernels, counted in what `nvdisasm -c` prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

WIDE = re.compile(r"\b(LDG|STG|LDS|STS)\S*\.128\b")
COUNTED = re.compile(WIDE.pattern + r"|\bSHFL\b")
FP64 = re.compile(r"\b(D(FMA|ADD|MUL|SETP)|MUFU\.\w+64\w*|F2F\.F(64\.F32|32\.F64))\b")
JUMP = re.compile(r"\bBRA\b(.*?)`\((\.L_\w+)\)")

# The instruction that unpacks the vectors of a dtype.
DTYPES = {"fp16": "HADD2.F32", "bf16": "0xffff0000"}


@dataclass
class Kernel:
    """A kernel's instructions, and by index where each may jump to."""

    instructions: list[str]
    jumps: dict[int, int]

    def following(self, i: int) -> list[int]:
        code = self.instructions[i]
        conditional = code.startswith("@") or bool(re.search(r"\bBRA\S*\s+!?U?P\d", code))
        found = [self.jumps[i]] if i in self.jumps and ".DIV" not in code else []
        ends = re.match(r"(BRA|EXIT|RET)\b", code) and not conditional
        return found if ends else [*found, i + 1]

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop, innermost first."""
        ends: dict[int, int] = {}
        for i, target in self.jumps.items():
            if target <= i:
                ends[target] = max(i, ends.get(target, 0))
        return sorted(ends.items(), key=lambda loop: loop[1] - loop[0])

    def iteration(self, loop: tuple[int, int]) -> list[str]:
        """One iteration's instructions: the shortest of the ways through it with most accesses and shuffles.

        Loops within it are gone through once. Empty where every way leaves the loop's place in the listing.
        """
        first, last = loop
        best: dict[int, tuple[int, int, list[int]]] = {first: (0, 0, [])}
        for i in range(first, last + 1):  # jumps back are left out, so this order is topological
            if i not in best:
                continue
            accesses, length, path = best[i]
            here = (accesses - bool(COUNTED.search(self.instructions[i])), length + 1, [*path, i])
            if i == last:
                return [self.instructions[j] for j in here[2]]
            for j in self.following(i):
                if i < j <= last and (j not in best or here[:2] < best[j][:2]):
                    best[j] = here
        return []


def kernels(listing: str) -> dict[str, Kernel]:
    """The kernels of a listing by their mangled names."""
    found = {}
    for name, text in re.findall(r"^\.text\.(\S+):$(.*?)(?=^//-|\Z)", listing, re.MULTILINE | re.DOTALL):
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(instructions)
            elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
                instructions.append(code[1])
        targets = {i: JUMP.search(code) for i, code in enumerate(instructions)}
        jumps = {i: labels[target[2]] for i, target in targets.items() if target}
        found[name] = Kernel(instructions, jumps)
    return found


def count(pattern: str, path: list[str]) -> int:
    return sum(bool(re.search(pattern, code)) for code in path)


def budget(kernel: Kernel) -> dict[str, float]:
    """Instructions per vector of each walk over a sample ("bf16 channels-last map"): its highest copy."""
    found: dict[str, float] = {}
    for loop in kernel.loops:
        first, last = loop
        if any(first <= a and b <= last and (a, b) != loop for a, b in kernel.loops):
            continue
        path = kernel.iteration(loop)
        if not count(WIDE.pattern, path):
            continue
        around = next(
            (outer for outer in kernel.loops if outer != loop and outer[0] <= first and last <= outer[1]),
            loop,
        )
        shuffles = count(r"\bSHFL", kernel.iteration(around))
        if shuffles:  # channels-last, the sums of all passes over the channels are added over the lanes
            path = kernel.iteration(around)
        stores = count(r"\bSTG\S*\.128", path)
        narrow_loads = count(r"\b(LDG|LDS)(?!\S*\.128)", path)
        dtype = next((name for name, sign in DTYPES.items() if count(sign, path)), "fp32")
        layout = "channels-last" if (narrow_loads if stores else shuffles) else "channels-first"
        staged = ", staged" if count(r"\b(LDS|STS)\S*\.128", path) else ""
        name = f"{dtype} {layout} {'gradient' if stores else 'map'}{staged}"
        vectors = stores or count(r"\bLDG\S*\.128", path)
        found[name] = max(found.get(name, 0), len(path) / vectors)
    return found


def fp64(kernel: Kernel) -> int:
    """fp64 instructions that no block gets around before the atomic that finds the last block."""
    atomic = next(i for i, code in enumerate(kernel.instructions) if "ATOM" in code)
    fewest = {0: 0}
    for i in range(atomic):
        if i in fewest:
            here = fewest[i] + bool(FP64.search(kernel.instructions[i]))
            for j in kernel.following(i):
                if i < j:
                    fewest[j] = min(here, fewest.get(j, here))
    return fewest[atomic]
