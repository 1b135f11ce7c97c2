"""Triton's compiler for a GPU that need not be there; apart, since it does not go with TRITON_INTERPRET=1."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from functional.sparse24.decode import BYTES_OF_A_PATCH
from functional.sparse24.decode_triton import decode_kernel
from functional.sparse24.rest import STRIPS


def decode_kernel_for(tiles: int, warps: int, tokens: int, rounds: int = 0, unroll: int = 1, capability: int = 80) -> str:
    """Triton's last text before LLVM, in which every tensor has its layout."""
    pointers = {name: "*i32" for name in ("x_ptr", "values_ptr", "indices_ptr", "rest_ptr", "starts_ptr")} | {
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
    }
    numbers = dict.fromkeys(("tokens", "rows", "tiles", "strips", "constant"), "i32")
    constants = {"HAS_BIAS": True, "BFLOAT16": True, "EVEN": False, "INTERPRETED": False, "UNROLL": unroll}
    constants |= {"OVERLAPS": capability >= 90}
    constants |= {"TOKENS": tokens, "TILES": tiles, "WARPS": warps, "ROUNDS": rounds}
    constants |= {"PATCH": STRIPS, "BYTES": str(16 + BYTES_OF_A_PATCH * tiles * warps)}
    names = decode_kernel.arg_names
    whole = [name for name in (*pointers, *numbers) if name not in ("tokens", "constant")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in whole}
    source = ASTSource(
        fn=decode_kernel,
        signature=pointers | numbers | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ttgir"]
