"""The Triton backend beyond its numbers, which the suite checks in Triton's interpreter: what it compiles to
for GPUs that need not be there, what it launches, and what it asks of its surroundings."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import kernels
import pytest
import torch
from cases import feature
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import at_fused
from at_fused import backends
from at_fused._outputs import empty_map, empty_maps

triton = pytest.importorskip("triton")
backend = backends.modules["triton"]
compiles = pytest.mark.skipif(cases.INTERPRETED, reason="the interpreter's kernels can't be compiled")

ARCHITECTURES, MAIN = [80, 90, 100], 90
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}


# --- ahead-of-time compilation ----------------------------------------------------------------------


class Launch:
    """Arguments of a kernel's launch."""

    def __init__(self, kernel: str, at: Tensor, programs: int, *arguments: Any, **constants: Any) -> None:
        self.kernel, self.at, self.programs = kernel, at, programs
        self.arguments, self.constants = arguments, constants

    def compile(self, architecture: int | str) -> Any:
        """The kernel as the launch would compile it: for NVIDIA's 80, 90, ..., or AMD's "gfx942", ..."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from at_fused.backends import _triton_kernels

        function = getattr(_triton_kernels, self.kernel)
        constants = {(function.arg_names.index(name),): value for name, value in self.constants.items()}
        signature = dict.fromkeys(function.arg_names, "constexpr")
        divisible: dict[tuple[int, ...], list[list[Any]]] = {}

        def type_of(value: Any, path: tuple[int, ...]) -> Any:
            plain = function.arg_names[path[0]] in function.do_not_specialize
            if isinstance(value, tuple):
                return tuple(type_of(item, (*path, i)) for i, item in enumerate(value))
            if isinstance(value, float):
                return "fp32"
            if value is None or (isinstance(value, int) and value == 1 and not plain):
                constants[path] = value
                return "constexpr"
            if isinstance(value, Tensor) or (value % 16 == 0 and not plain):
                divisible[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype] if isinstance(value, Tensor) else f"i{32 if abs(value) < 2**31 else 64}"

        names = [name for name in function.arg_names if name not in self.constants]
        for name, value in zip(names, self.arguments, strict=True):
            signature[name] = type_of(value, (function.arg_names.index(name),))
        source = ASTSource(function, signature, constexprs=constants, attrs=divisible)
        amd = isinstance(architecture, str)
        target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", architecture, 32)
        return triton.compile(source, target, options=backend.options(target.backend))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What would be launched; nothing is."""
    recorded: list[Launch] = []
    monkeypatch.setattr(backend, "_launch", lambda *a, **k: recorded.append(Launch(*a, **k)))
    return recorded


def resources(binary: Any, folder: Path) -> dict[str, int]:
    """Registers, and bytes of stack (to which they are spilled), of shared and of local memory."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    printed = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", printed)
    assert len(found) == 4, printed
    return {name: int(value) for name, value in found}


def every_kind() -> list[Tensor]:
    """Each dtype with vectors of positions, of channels, and without; and what is the same for all dtypes."""
    feats = [far_apart := cases.far_apart((2, 3, 4, 2), 1)]
    assert layout_of(far_apart).kind.wide
    for dtype in cases.DTYPES:
        options = {"dtype": dtype, "layout": Tensor.contiguous}
        feats += [
            feature(3, 64, 16, 16, **options),
            feature(3, 64, 16, 16, **options | {"layout": cases.channels_last}),
            feature(3, 33, 7, 7, **options),
            feature(3, 40, 7, 7, **options),
        ]
    feats += [feature(3, 33, 7, 7, layout=cases.channels_last), feature(3, 6, 5, 4, layout=cases.sliced)]
    return [feat.detach() for feat in feats]


def layout_of(feat: Tensor) -> Any:
    attention = empty_map(feat)
    return backend._layout(feat.dtype, "sum", feat.shape, feat.stride(), attention.stride())


# As the reference's own cases: 1, 2, 4, another whole number and none; max meets p only after its search.
EXPONENTS = [(1, "sum"), (2, "sum"), (4, "sum"), (3, "sum"), (2.5, "sum"), (2, "max"), (2.5, "max")]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "p, mapping, architecture",
    [
        (*exponent, architecture)
        for exponent in EXPONENTS
        for architecture in ARCHITECTURES
        # on the others the usual exponent, and those that take the most registers
        if architecture == MAIN or exponent in ((2, "sum"), (2.5, "sum"), (2.5, "max")) or cases.SOAK > 1
    ],
)
def test_every_specialisation_compiles_without_spilling(
    p: float, mapping: str, architecture: int, launches: list[Launch], tmp_path: Path
) -> None:
    """A launch for each dtype: one of all 19 kinds, which no call has, keeps 8 bytes on the stack."""
    for dtype in cases.DTYPES:
        feats = [feat for feat in every_kind() if feat.dtype == dtype]
        maps = kernels.maps(backend, feats, p, mapping)
        kernels.gradients(backend, feats, maps, torch.ones(()), p, mapping)
    for launch in launches:
        used = resources(launch.compile(architecture), tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, f"{launch.kernel}: {used}"


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("student_slopes, teacher_slopes", [(True, True), (True, False), (False, False)])
def test_the_loss_of_maps_compiles_without_spilling(
    student_slopes: bool,
    teacher_slopes: bool,
    reduce: bool,
    architecture: int,
    launches: list[Launch],
    tmp_path: Path,
) -> None:
    feats = [feature(3, 4, 5, 5, dtype=dtype).detach() for dtype in (torch.float64, torch.float16)]
    wanted = {"reduce": reduce, "student_slopes": student_slopes, "teacher_slopes": teacher_slopes}
    kernels.loss(backend, feats, feats, **wanted)
    used = resources(launches[1].compile(architecture), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used


def global_accesses(binary: Any) -> list[tuple[str, int]]:
    """Every load and store of global memory: which of the two, and its bits."""
    found = re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)\b", binary.asm["ptx"])
    return [(kind, int(count or 1) * int(bits)) for kind, count, bits in found]


@compiles
@pytest.mark.parametrize(
    "shape, layout, dtype, bits",
    [
        *[((3, 64, 32, 32), Tensor.contiguous, dtype, 128) for dtype in cases.DTYPES],
        *[((3, 64, 32, 32), cases.channels_last, dtype, 128) for dtype in cases.DTYPES],
        ((3, 24, 16, 9), cases.transposed, torch.bfloat16, 128),
        ((3, 24, 14, 14), cases.channels_first, torch.float32, 128),
        ((3, 256, 14, 14), Tensor.contiguous, torch.bfloat16, 64),  # rows begin at multiples of 8 bytes
        ((3, 40, 7, 7), cases.channels_last, torch.float16, 128),
        *[((3, 512, 7, 7), Tensor.contiguous, dtype, 128) for dtype in cases.DTYPES],  # folded
        ((3, 40, 7, 7), Tensor.contiguous, torch.bfloat16, 128),
        ((3, 36, 7, 7), Tensor.contiguous, torch.bfloat16, 16),  # no multiple of 8 channels: begin anywhere
        ((3, 512, 6, 6), Tensor.contiguous, torch.float16, 128),
    ],
    ids=cases.name_of,
)
def test_accesses_are_as_wide_as_the_layout_allows(
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    bits: int,
    launches: list[Launch],
) -> None:
    """On every architecture in bf16; the other dtypes take the same way there."""
    feat = feature(*shape, dtype=dtype, layout=layout).detach()
    kernels.gradients(backend, [feat], kernels.maps(backend, [feat]))
    element = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).bits
    # As often as the tile asks for, and no more: 128 threads, each its part of the elements.
    kind, width = layout_of(feat).kind, bits // 8 // dtype.itemsize
    count = -(-kind.block_c * kind.block_p // (128 * width))
    for architecture in ARCHITECTURES if dtype == torch.bfloat16 or cases.SOAK > 1 else [MAIN]:
        maps, gradients = (global_accesses(launch.compile(architecture)) for launch in launches)
        assert {width for kind, width in maps if kind == "ld"} == {bits}
        assert {width for kind, width in gradients if kind == "st"} == {bits}
        # Backward also loads the map's gradient, whose width is its own.
        assert {width for kind, width in gradients if kind == "ld"} <= {bits, element, 4 * element, 128}
        assert maps.count(("ld", bits)) == gradients.count(("st", bits)) == count


# --- launches ---------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """The names of all operators of PyTorch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("reduce", [True, False])
def test_two_launches_forward_and_one_backward(mapping: str, reduce: bool, launches: list[Launch]) -> None:
    """For all pairs of every kind, and besides them only allocations: no copy, and no wait for the device."""
    students = every_kind()
    teachers = [feature(*x.shape, seed=1, dtype=x.dtype, layout=cases.channels_last) for x in students]
    with Operators() as called:
        found = kernels.loss(
            backend, students, teachers, None, 2.5, mapping, reduce=reduce, teacher_slopes=True
        )
    assert [launch.kernel for launch in launches] == ["maps_kernel", "loss_kernel"]
    assert called.names <= {"empty"}
    launches.clear()

    scale = torch.ones(()) if reduce else torch.ones(()).expand(2 * len(students))
    with Operators() as called:
        slopes = [*found.student_slopes, *found.teacher_slopes]
        kernels.gradients(backend, [*students, *teachers], slopes, scale, 2.5, mapping)
    assert [launch.kernel for launch in launches] == ["gradients_kernel"]
    assert called.names <= {"empty_like"}


def test_a_map_gradient_is_read_where_it_is(launches: list[Launch]) -> None:
    """sum() hands back one number, expanded."""
    feat, expanded = feature(2, 3, 4, 5).detach(), torch.ones(()).expand(2, 4, 5)
    kernels.gradients(backend, [feat], [expanded])
    ((tensor, *strides),) = launches[0].arguments[1]
    assert tensor is expanded
    assert strides == [0, (0,)]


def test_nothing_is_launched_for_an_empty_batch(launches: list[Launch]) -> None:
    empty = feature(0, 3, 4, 4).detach()
    found = kernels.loss(backend, [empty], [empty])
    assert found.loss == 0
    kernels.gradients(backend, [empty], found.student_slopes, found.loss)
    assert sum(launch.programs for launch in launches) == 0


@compiles
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: a model on the second GPU need not have made it current."""
    from at_fused.backends import _triton_kernels

    current: list[torch.device] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        current.append(which)
        yield
        current.pop()

    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *a, **k: launched.append((grid, *current))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(backend, "_target", lambda: "cuda")
    for name in ("maps_kernel", "loss_kernel", "gradients_kernel"):
        monkeypatch.setattr(_triton_kernels, name, Kernel())
    feat = feature(2, 4, 3, 3).detach()
    kernels.gradients(backend, [feat], kernels.loss(backend, [feat], [feat]).student_slopes)
    assert launched == [((4,), feat.device), ((2,), feat.device), ((2,), feat.device)]


# --- GPUs that are not NVIDIA's ---------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("target, device", [("cuda", "cuda:1"), ("hip", "cuda:1"), ("xpu", "xpu:1")])
def test_options_are_those_of_the_target(target: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's builds for ROCm and XPU refuse `maxnreg`; torch's for XPU has no CUDA device to choose."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from at_fused.backends import _triton_kernels

    entered: list[tuple[str, torch.device]] = []
    for module in ("cuda", "xpu"):

        @contextmanager
        def enter(which: torch.device, module: str = module) -> Iterator[None]:
            entered.append((module, which))
            yield

        monkeypatch.setattr(getattr(torch, module), "device", enter)

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget(target, 90, 32)

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *arguments, **options: passed.append(options)

    passed: list[dict[str, Any]] = []
    monkeypatch.setattr(_triton_kernels, "maps_kernel", Kernel())
    monkeypatch.setattr(driver, "_active", Driver())
    backend._target.cache_clear()
    try:
        backend._launch("maps_kernel", SimpleNamespace(device=torch.device(device)), 3)
    finally:
        backend._target.cache_clear()
    assert entered == [(device.split(":")[0], torch.device(device))]
    assert passed == [backend.options(target)]
    assert ("maxnreg" in passed[0]) == (target == "cuda")


@compiles
@pytest.mark.parametrize("target, architecture", [("cuda", 90), ("hip", "gfx942")])
def test_triton_knows_every_option(target: str, architecture: int | str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    known = make_backend(GPUTarget(target, architecture, 32)).parse_options({})
    assert all(hasattr(known, name) for name in backend.options(target))
    assert hasattr(known, "maxnreg") == (target == "cuda")


@compiles
@pytest.mark.slow
def test_kernels_compile_for_amd(launches: list[Launch]) -> None:
    feats = [feat for feat in every_kind() if feat.dtype in (torch.bfloat16, torch.float32)]
    for mapping in ("sum", "max"):
        kernels.loss(backend, feats, feats, mapping=mapping)
        kernels.gradients(backend, feats, empty_maps(feats), mapping=mapping)
    for launch in launches:
        assert launch.compile("gfx942").asm["hsaco"]


def test_tensors_of_gpus_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    for device in ("cuda", "xpu"):
        feat = SimpleNamespace(device=torch.device(device))
        assert backend.unsupported([feat], 2, "sum") is None
    assert "not cpu" in backend.unsupported([torch.ones(1, 1, 1)], 2, "sum")


# --- layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", cases.DENSE, ids=cases.name_of)
def test_the_space_of_dense_features_is_walked_in_the_order_of_memory(layout) -> None:
    for shape in ((2, 3, 4, 5), (2, 3, 4, 5, 6), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 5), (2, 3, 1, 1)):
        feat = feature(*shape, layout=layout).detach()
        found = layout_of(feat)
        _, channels, positions, inner = found.grid
        assert (channels, positions) == (shape[1], math.prod(shape[2:]))
        steps = found.feat[2]
        assert list(steps) == sorted(steps, reverse=True)
        if layout is not cases.transposed:  # whose map is walked across
            assert inner == ()


def test_a_kind_does_not_depend_on_the_batch() -> None:
    """Else the last batch of an epoch would wait for a compilation of its own."""
    for layout in (*cases.DENSE[:4], cases.sliced):
        kinds = {layout_of(feature(batch, 48, 14, 14, layout=layout)).kind for batch in (2, 3, 16, 31)}
        assert len(kinds) == 1


def test_kinds_are_few() -> None:
    kinds = {
        layout_of(feature(2, channels, *size, layout=layout).detach()).kind[:3]
        for channels in range(1, 70, 3)
        for size in ((7, 7), (8, 8), (12, 9), (5, 30))
        for layout in cases.LAYOUTS
    }
    assert len(kinds) <= 9, "a vector of 1 to 16 positions or channels"


def test_parts_add_up_to_the_number() -> None:
    from at_fused.backends.triton import _parts

    draw = random.Random(0)
    numbers = [draw.gauss(0, 1) * 10.0 ** draw.randint(-12, 30) for _ in range(1000)]
    for number in [0.0, 1.0, -1e-12, 1 / 3, 1000 / 7, *numbers]:
        parts = _parts(number)
        assert sum(parts) == number
        assert all(torch.tensor(part, dtype=torch.float32).item() == part for part in parts)
    assert sum(_parts(1e300)) == math.inf


# --- surroundings -----------------------------------------------------------------------------------


def run(script: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    return ran.stdout


def test_kernels_are_imported_only_where_they_are_used() -> None:
    run("import sys, at_fused; assert 'at_fused.backends._triton_kernels' not in sys.modules")


def test_without_triton() -> None:
    assert "pip install triton" in run("""
        import sys
        sys.modules["triton"] = None  # as where it is not installed
        import torch, at_fused
        assert "triton" not in at_fused.available_backends()
        x = torch.ones(2, 3, 4, 4)
        at_fused.attention_loss(x, x)
        try:
            at_fused.attention_loss(x, x, backend="triton")
        except ValueError as error:
            print(error)
    """)


@pytest.mark.parametrize(
    "version, served", [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True), ("?", True)]
)
def test_an_old_triton_is_told(version: str, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    reason = backend.unavailable() or ""
    assert ("needs Triton 3.6" in reason) != served


@compiles
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    x = feature(2, 3, 4, 4)
    with pytest.raises(ValueError, match="no GPU"):
        at_fused.attention_loss(x, x, backend="triton")
