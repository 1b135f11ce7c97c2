"""Which configuration of the decoding kernels is fastest for a shape: `python -m benchmarks.sparse24 --part tune`."""

import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import nn

from benchmarks.cuda_graphs import captured, cold_copies, seconds
from functional.sparse24 import Config, decode, default_config
from lightning_modules.linear24 import Linear24

ROWS, BYTES, SPLITS, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 4, 8), (2, 3, 4, 5)
ROWS_OF_ONE, BYTES_OF_ONE = (2, 4, 8, 16, 32), (32, 64, 128, 256)
LARGEST_TILE, SMALLEST_TILE = 8192, 512
SHARED_MEMORY = 220 * 1024
COMPILERS = 12
SHOWN = 5
REPLAYS = 7


def grid(tokens: int, width: int, itemsize: int) -> list[Config]:
    """What could be fast, in random but always the same order."""
    found = []
    for rows, size, splits, warps, stages in itertools.product(ROWS, BYTES, SPLITS, WARPS, STAGES):
        tile = rows * size * (1 + 4 * itemsize) + 16 * 8 * size * itemsize
        if 16 * warps <= rows * 8 and tile * (stages - 1) <= SHARED_MEMORY:  # a warp has eight rows or more
            found.append(Config(1, rows, size, splits, warps, stages))
    if tokens == 1:
        for rows, size, splits, warps, stages in itertools.product(ROWS_OF_ONE, BYTES_OF_ONE, SPLITS, WARPS, STAGES):
            if rows * size // warps <= 2048:  # else registers do not suffice
                found.append(Config(0, rows, size, splits, warps, stages))
    found = [
        config
        for config in found
        if SMALLEST_TILE <= config.rows * config.bytes <= LARGEST_TILE and config.splits * config.bytes <= width
    ]
    random.Random(0).shuffle(found)
    return found


def tune(linear: nn.Linear, name: str, tokens: int, budget: float) -> list[tuple[float, Config]]:
    """Try configurations for some seconds; print and return the fastest, in seconds of a call, and the default's place.

    On a GPU half of the time goes into compiling, in processes of their own.
    """
    compressed = Linear24.from_linear(linear)
    x = torch.randn(tokens, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)
    default = default_config(tokens, *compressed.indices.shape)
    configs = [default, *grid(tokens, compressed.indices.shape[1], x.itemsize)]
    begin = time.monotonic()
    if x.is_cuda:
        configs = list(compiled(configs, x, compressed, begin + budget / 2))
    dense, turns = cold_copies(linear), cold_copies(compressed)
    base = seconds(captured(lambda: [turn(x) for turn in dense], x.device), x.device, REPLAYS) / len(dense)
    found, failed = [], 0
    expected = linear(x).float()
    for config in configs:
        if time.monotonic() - begin > budget and found:
            break
        try:
            y = decode(x, compressed.values, compressed.indices, None, config).float()
            run = captured(lambda config=config: [decode(x, m.values, m.indices, None, config) for m in turns], x.device)
            took = seconds(run, x.device, REPLAYS) / len(turns)
        except Exception as problem:  # a tile too large for this card is Triton's error, one of several classes
            failed += 1
            print(f"  {config}: {type(problem).__name__}: {str(problem)[:100]}", flush=True)
            continue
        if (y - expected).norm() > 0.02 * expected.norm():
            print(f"  {config} is WRONG by {(y - expected).norm() / expected.norm():.3f}", flush=True)
            continue
        found.append((took, config))
    found.sort()
    print(f"{name}, {tokens} tokens: dense {1e6 * base:.2f} us; {len(found)} configurations, {failed} failed", flush=True)
    for took, config in found[:SHOWN] + [entry for entry in found[SHOWN:] if entry[1] == default]:
        rate = compressed.nbytes / took / 1e9
        mark = " (default)" if config == default else ""
        print(f"  {1e6 * took:8.2f} us  {base / took:5.2f}x  {rate:6.0f} GB/s  {tuple(config)}{mark}", flush=True)
    return found


def compiled(configs: list[Config], x: torch.Tensor, linear: Linear24, until: float) -> Iterator[Config]:
    """Those that could be compiled before a time; they are in Triton's cache on disk then."""
    shape = (len(x), *linear.indices.shape, str(x.dtype).removeprefix("torch."))
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(compile_one, config, shape, until): config for config in configs}
        for future, config in waiting.items():
            problem = future.result()
            if problem is None:
                yield config
            elif problem:
                print(f"  {config}: {problem}", flush=True)


def compile_one(config: Config, shape: tuple, until: float) -> str | None:
    """Run one configuration once on zeros; None if it went well, what went wrong, or nothing if it was too late."""
    if time.monotonic() > until:
        return ""
    tokens, rows, width, dtype = shape
    options = {"device": "cuda", "dtype": getattr(torch, dtype)}
    values, indices = torch.zeros(2, rows, 2 * width, **options), torch.zeros(rows, width, device="cuda", dtype=torch.uint8)
    try:
        decode(torch.zeros(tokens, 8 * width, **options), values, indices, None, config)
        torch.cuda.synchronize()
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:100]}"
    return None
