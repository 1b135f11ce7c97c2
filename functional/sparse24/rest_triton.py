"""Parts of Triton kernels that multiply or restore the rest of a matrix: what is left of it beside a 2:4 one (rest.py).

The words of a patch lie in no order of lanes. Threads store each value at its place in shared memory and load what their lanes
need, as if it were the values of another 2:4 matrix, at the two positions of each group that the first one leaves out.

With ``TRITON_INTERPRET=1`` plain operations replace the instructions.
"""

import triton
import triton.language as tl

from functional.words_triton import four_words

BYTES_OF_A_STRIP: tl.constexpr = tl.constexpr(1024)
BYTES_OF_A_PATCH: tl.constexpr = tl.constexpr(4096 + 16)
"""With a place for words that are none."""
NO_WORD: tl.constexpr = tl.constexpr(4096)


@triton.jit
def shared_memory(
    lane, patch, BYTES: tl.constexpr, PATCHES: tl.constexpr, LANES: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Return the address of memory that the threads of a program share, and that of each thread's patches; all values zero.

    Args:
        lane: Number of each thread among the LANES that share patches.
        patch: Number of the first of these patches.
        BYTES: Number of bytes, as a string.
        PATCHES: Patches of LANES threads at a time; 0 if there is no rest.
        LANES: Threads that share patches.
        INTERPRETED: Whether Triton's interpreter runs the kernel, which needs no such memory.
    """
    if INTERPRETED:
        return lane, lane
    ASM: tl.constexpr = "{ .shared .align 16 .b8 memory[" + BYTES + "]; mov.u32 $0, memory; }"
    shared = tl.inline_asm_elementwise(ASM, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)
    memory = shared + 16 + patch * BYTES_OF_A_PATCH
    _clear(shared)
    for turn in tl.static_range(PATCHES):
        for line in tl.static_range(4 * BYTES_OF_A_STRIP // (16 * LANES)):
            _clear(memory + turn * BYTES_OF_A_PATCH + 16 * (LANES * line + lane))
    return shared, memory


@triton.jit
def _clear(at):
    """Set 16 bytes from each address to zero."""
    tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {0, 0, 0, 0}; mov.u32 $0, 0;", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def load_word(at):
    """Load 4 bytes from each address; products that need them are not moved before a barrier that this comes after."""
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_warp(lane):
    """Let the lanes of a warp see what each of them has stored."""
    tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def words_of(rest_ptr, bounds, lane, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    """Load the words of a patch: ROUNDS of (threads,).

    Args:
        rest_ptr: `Rest.words`.
        bounds: Numbers of the first word of the patch and of the next one, for each thread.
        lane: Number of each thread among the LANES that share the patch.
        ROUNDS: Words that a thread takes; `NO_WORD` past the last one.
        LANES: Threads that share a patch.
    """
    found = ()
    for turn in tl.static_range(ROUNDS):
        number = bounds[0] + LANES * turn + lane
        found += (tl.load(rest_ptr + number, mask=number < bounds[1], other=NO_WORD),)
    return found


@triton.jit
def bounds_of(starts_ptr, patch, tile, tiles, patches):
    """Return the numbers of the first word of a patch and of the next one; the same if there is no such patch.

    Args:
        starts_ptr: `Rest.starts`.
        patch: Number of the patch in its tile, for each thread.
        tile: Number of the tile; past the last tile that one is taken.
        tiles: Number of tiles.
        patches: Number of patches of a tile.
    """
    at = starts_ptr + tl.minimum(tile, tiles - 1) * patches + patch
    return tl.load(at, mask=patch < patches, other=0), tl.load(at + 1, mask=patch < patches, other=0)


@triton.jit
def scatter(words, memory, ROUNDS: tl.constexpr):
    """Store the values of a patch at their places.

    Args:
        words: Its words, from `words_of`.
        memory: Address of the memory of the patch, for each thread.
        ROUNDS: Number of words of a lane.
    """
    for turn in tl.static_range(ROUNDS):
        tl.inline_asm_elementwise(
            """{ .reg .b16 low, high; .reg .b32 at; mov.b32 {low, high}, $1;
            cvt.u32.u16 at, low; add.u32 at, at, $2; st.shared.b16 [at], high; mov.u32 $0, 0; }""",
            "=r,r,r", [words[turn], memory], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def gather(
    words, memory, lane, STRIP: tl.constexpr, ROUNDS: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Load the registers of both steps of a strip of a patch, and set their memory to zero for the next patch.

    Args:
        words: Words of the patch; only plain operations read them.
        memory: Address of its memory, for each thread.
        lane: Lane of each thread.
        STRIP: Number of the strip in the patch.
        ROUNDS: Number of words of a lane.
        WARPS: Warps of the program.
        INTERPRETED: Whether plain operations take the place of instructions.
    """
    if INTERPRETED:
        return _gather_by_plain_operations(words, STRIP, ROUNDS, WARPS)
    a = tl.inline_asm_elementwise(
        """ld.shared.v4.b32 {$0, $1, $2, $3}, [$8]; ld.shared.v4.b32 {$4, $5, $6, $7}, [$8 + 512];
        st.shared.v4.b32 [$8], {0, 0, 0, 0}; st.shared.v4.b32 [$8 + 512], {0, 0, 0, 0};""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [memory + BYTES_OF_A_STRIP * STRIP + 16 * lane],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    return (a[0], a[1], a[2], a[3]), (a[4], a[5], a[6], a[7])


@triton.jit
def _gather_by_plain_operations(words, STRIP: tl.constexpr, ROUNDS: tl.constexpr, WARPS: tl.constexpr):
    """Compute the same as `scatter` and `gather`."""
    found = scattered_by_plain_operations(words, BYTES_OF_A_STRIP * STRIP, 512, ROUNDS, WARPS, 32)
    a0, a1 = tl.split(tl.permute(tl.reshape(found, (WARPS, 2, 32, 4)), (0, 2, 3, 1)))
    return four_words(tl.reshape(a0, (32 * WARPS, 4)), 32 * WARPS), four_words(tl.reshape(a1, (32 * WARPS, 4)), 32 * WARPS)


@triton.jit
def scattered_by_plain_operations(
    words, FIRST: tl.constexpr, VALUES: tl.constexpr, ROUNDS: tl.constexpr, PATCHES: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Return what `scatter` stores, (PATCHES, VALUES / 2) of int32, two values each.

    Args:
        words: Words of the patches, from `words_of`.
        FIRST: First byte of a patch that is wanted.
        VALUES: Number of values that are wanted.
        ROUNDS: Words that a thread takes.
        PATCHES: Number of patches.
        LANES: Threads that share a patch.
    """
    found = tl.zeros((PATCHES, VALUES), tl.int32)
    place = FIRST + 2 * tl.arange(0, VALUES)[None, None, :]
    for turn in tl.static_range(ROUNDS):
        word = tl.reshape(words[turn], (PATCHES, LANES))[:, :, None]
        found += tl.sum(tl.where((word & 0xFFFF) == place, word >> 16 & 0xFFFF, 0), 1)
    low, high = tl.split(tl.reshape(found, (PATCHES, VALUES // 2, 2)))
    return low | high << 16


@triton.jit
def other_positions(nibbles):
    """Return the nibbles of the two positions that each nibble of a word leaves out: n ^ 5, but n ^ 10 for 4 and 14."""
    ends = ((nibbles ^ -1) >> 3 | nibbles >> 1) & 0x11111111
    return nibbles ^ 0x55555555 ^ ((ends << 4) - ends)
