"""Triton's compiler for a GPU that need not be there; apart, since it does not go with TRITON_INTERPRET=1."""

import os
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from functional.sparse import decode_triton as lanes_triton
from functional.sparse24.decode import BYTES_OF_A_PATCH
from functional.sparse24.decode_triton import decode_kernel
from functional.sparse24.expand_triton import expand_kernel
from functional.sparse24.rest import STRIPS

ROOT = Path(__file__).parents[2]
MARKS = {
    "griddepcontrol.wait": "wait",
    "tt.load": "load",
    "gpu.barrier": "barrier",
    "ttg.barrier": "barrier",
    "mma.sp": "product",
    "scf.for": "for",
    "tt.store": "store",
}
"""Part of a line of the compiler's text -> what it does."""


def decode_kernel_for(tiles: int, warps: int, tokens: int, rounds: int = 0, unroll: int = 1, capability: int = 80) -> str:
    """Triton's last text before LLVM of the 2:4 kernel, in which every tensor has its layout."""
    pointers = dict.fromkeys(("x_ptr", "values_ptr", "indices_ptr", "rest_ptr", "starts_ptr"), "*i32")
    numbers = dict.fromkeys(("tokens", "rows", "tiles", "strips"), "i32") | {"constant": "u1"}
    constants = {"HAS_BIAS": True, "BFLOAT16": True, "EVEN": False, "INTERPRETED": False, "UNROLL": unroll}
    constants |= {"TOKENS": tokens, "TILES": tiles, "WARPS": warps, "ROUNDS": rounds, "OVERLAPS": capability >= 90}
    constants |= {"PATCH": STRIPS, "BYTES": str(16 + BYTES_OF_A_PATCH * tiles * warps)}
    return _compiled(decode_kernel, pointers, numbers, constants, warps, capability)["ttgir"]


def lanes_kernel_for(tokens: int, capability: int = 80) -> str:
    """The same of the kernel on lanes."""
    pointers = {"x_ptr": "*bf16" if tokens == 1 else "*i32"} | dict.fromkeys(("values_ptr", "steps_ptr", "starts_ptr"), "*i32")
    pointers |= {"firsts_ptr": "*i16", "order_ptr": "*i32"}
    numbers = {"tokens": "i32", "rows": "i32", "constant": "u1"}
    constants = {"HAS_BIAS": True, "BFLOAT16": True, "TOKENS": tokens, "HEIGHT": 16, "PARTS": 4, "UNROLL": 1}
    constants |= {"OVERLAPS": capability >= 90}
    return _compiled(lanes_triton.decode_kernel, pointers, numbers, constants, 2, capability)["ttgir"]


def expand_kernel_for(rounds: int, capability: int = 80) -> str:
    """The assembler text of the kernel that restores the dense matrix."""
    pointers = dict.fromkeys(("values_ptr", "indices_ptr", "rest_ptr", "starts_ptr", "out_ptr"), "*i32")
    constants = {"ROUNDS": rounds, "WARPS": 8, "PATCH": STRIPS, "BYTES": str(16 + 2 * BYTES_OF_A_PATCH), "INTERPRETED": False}
    numbers = dict.fromkeys(("rows", "columns", "strips"), "i32")
    return _compiled(expand_kernel, pointers, numbers, constants, 8, capability)["ptx"]


def _compiled(kernel, pointers: dict, numbers: dict, constants: dict, warps: int, capability: int) -> dict[str, str]:
    """Texts of a kernel; pointers of a bias and of the result are bfloat16 unless they are given."""
    names = kernel.arg_names
    types = {name: "*bf16" for name in ("bias_ptr", "out_ptr") if name in names} | pointers | numbers
    whole = [name for name in types if name not in ("tokens", "constant")]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm


def compiled(call: str) -> str:
    """Return the text of one of these functions, called in another process, where there is no interpreter."""
    code = f"from tests.helpers import compiling; print(compiling.{call})"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def steps_of(text: str) -> list[str]:
    """Return what the lines of a text do, those of `MARKS`."""
    return [name for line in text.splitlines() for mark, name in MARKS.items() if mark in line]
