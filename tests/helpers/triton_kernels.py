"""Runs Triton kernels in its interpreter, and compiles them for GPUs. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
LEAST_SHARED = 99 * 1024  # bytes of shared memory of a block, on GPUs of capability 8.6 and 8.9
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
    torch.int32: "*i32", int: "i32", float: "fp32", bool: "i1",
}  # fmt: skip


# Triton is told when it is imported that its kernels are to be interpreted, on the CPU: so in a process of their own.
# Its numbers are arrays of one element, which NumPy no longer takes for the end of a loop.
INTERPRETER = """
import importlib, sys, torch
kernels = importlib.import_module(sys.argv[1])
from triton.runtime import interpreter
plain = interpreter._patch_lang_tensor
def patched(tensor, scope):
    plain(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
interpreter._patch_lang_tensor = patched
found = [(getattr(kernels, name)(*given), given) for name, given in torch.load(sys.argv[2])]
torch.save(found, sys.argv[2])
"""


def interpret(module: str, calls: list[tuple[str, tuple]], folder: Path) -> list[tuple[Any, tuple]]:
    """What functions of a module make with interpreted kernels: of each call (result, the arguments afterwards).

    Args:
        module: its name.
        calls: the functions' names and arguments.
        folder: for a file of tensors.
    """
    file = folder / "tensors.pt"
    torch.save(calls, file)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "utils")}
    subprocess.run([sys.executable, "-c", INTERPRETER, module, file], env=environment, check=True)
    return torch.load(file)


def assert_compiled(asked: list, capability: int) -> None:
    """What was noted compiles as a first call on such a GPU would, and with room in its shared memory."""
    for source, options in asked:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"] and made.metadata.shared <= LEAST_SHARED


class Noted:
    """Replaces a kernel and notes what it would be compiled from."""

    def __init__(self, kernel: triton.JITFunction, asked: list):
        self.kernel, self.asked = kernel, asked

    def __getitem__(self, grid: tuple):
        def launch(*given, **options):
            named = dict(zip(self.kernel.arg_names, given, strict=True))
            constant = {key: value for key, value in named.items() if key.isupper()}
            signature = {
                key: "constexpr" if key.isupper() else TYPES[value.dtype if torch.is_tensor(value) else type(value)]
                for key, value in named.items()
            }
            aligned = {
                (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if "*" in kind
            }
            self.asked.append((ASTSource(self.kernel, signature, constant, aligned), options))

        assert all(isinstance(size, int) and size > 0 for size in grid)
        return launch
