"""An installed at_fused works: the loss and its gradient, and the command. Prints the backends."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

import at_fused
from at_fused import command_line

assert at_fused.__file__.startswith(sys.prefix), at_fused.__file__
student = torch.randn(2, 3, 5, 7, requires_grad=True)
teacher = torch.randn(2, 8, 5, 7)
grads = [
    torch.autograd.grad(at_fused.AttentionLoss(backend=backend)(student, teacher), student)[0]
    for backend in ("auto", "reference")
]
torch.testing.assert_close(*grads)
assert grads[0].abs().sum() > 0


script = Path(sys.executable).with_name("at-fused")
told = subprocess.run([script, "--version"], text=True, capture_output=True, check=True).stdout
assert told == f"at_fused {at_fused.__version__}\n"


def run(*words: str) -> tuple[int | str | None, str]:
    """Exit code and output of the command, in this process."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        try:
            code: int | str | None = command_line.main(words)
        except SystemExit as error:  # --help
            code = error.code
    return code, output.getvalue()


for command, flag in (("maps", "--checkpoint"), ("taps", "--help")):
    code, told = run(command, "--help")
    assert code == 0, told
    assert flag in told, told
for command in ("train", "reproduce"):
    code, told = run(command)
    assert (code, told.count("\n"), "checkout" in told) == (2, 1, True), told
print(*at_fused.available_backends())
