"""Which configuration of the decoding kernels is fastest for a shape: `python -m benchmarks.sparse24 --part tune`."""

import itertools
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import torch
from torch import nn

from benchmarks.cuda_graphs import captured, cold_copies, seconds
from functional.sparse24 import Config, decode, default_config
from lightning_modules.linear24 import Linear24

SPLITS, STAGES = (1, 2, 4, 8), (2, 3, 4)
TILES = [(rows, size, warps) for rows in (32, 64, 128) for size in (32, 64) for warps in (2, 4, 8)]
TILES_OF_ONE = [(rows, size, warps) for rows in (4, 8, 16, 32) for size in (64, 128, 256) for warps in (2, 4, 8)]
BYTES_OF_A_THREAD = (4, 32)
"""Fewer leave nothing to do at a time, more do not fit into registers."""
ROWS_OF_A_WARP = 8
COMPILERS = 12
SHOWN = 5
REPLAYS = 7


def grid(tokens: int, width: int) -> list[Config]:
    """What could be fast, in random but always the same order."""
    tiles = [(1, *tile) for tile in TILES if tile[0] >= ROWS_OF_A_WARP * tile[2]]
    if tokens == 1:
        tiles += [(0, *tile) for tile in TILES_OF_ONE]
    found = [
        Config(cores, rows, size, splits, warps, stages)
        for (cores, rows, size, warps), splits, stages in itertools.product(tiles, SPLITS, STAGES)
        if BYTES_OF_A_THREAD[0] <= rows * size // (32 * warps) <= BYTES_OF_A_THREAD[1] and splits * size <= width
    ]
    random.Random(0).shuffle(found)
    return found


def tune(linear: nn.Linear, name: str, tokens: int, budget: float) -> list[tuple[float, Config]]:
    """Try configurations for some seconds after they were compiled; print the fastest, and the default's place.

    Returns:
        Seconds of a call and configuration, fastest first.
    """
    compressed = Linear24.from_linear(linear)
    x = torch.randn(tokens, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)
    default = default_config(tokens, *compressed.indices.shape)
    configs = [default, *grid(tokens, compressed.indices.shape[1])]
    if x.is_cuda:
        configs = compiled(configs, x, compressed)
    dense, turns = cold_copies(linear), cold_copies(compressed)
    base = seconds(captured(lambda: [turn(x) for turn in dense], x.device), x.device, REPLAYS) / len(dense)
    found, failed = [], 0
    expected, begin = linear(x).float(), time.monotonic()
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


@cache
def compilers() -> ProcessPoolExecutor:
    """Processes of their own, since compiling takes most of the time; they stay for the next shape."""
    return ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn"))


def compiled(configs: list[Config], x: torch.Tensor, linear: Linear24) -> list[Config]:
    """Those that could be compiled; they are in Triton's cache on disk then."""
    begin = time.monotonic()
    shape = (len(x), *linear.indices.shape, str(x.dtype).removeprefix("torch."))
    jobs = {kernel: compilers().submit(compile_one, kernel, shape) for kernel in {kernel_of(config) for config in configs}}
    problems = {kernel: job.result() for kernel, job in jobs.items()}
    for kernel, problem in problems.items():
        if problem:
            print(f"  {kernel}: {problem}", flush=True)
    print(f"{len(jobs)} kernels compiled in {time.monotonic() - begin:.0f} s", flush=True)
    return [config for config in configs if problems[kernel_of(config)] is None]


def kernel_of(config: Config) -> Config:
    """The configuration that shares its kernel: several splits are compiled alike."""
    return config._replace(splits=min(config.splits, 2))


def compile_one(config: Config, shape: tuple) -> str | None:
    """Run one configuration once on zeros; None if it went well, else what went wrong."""
    tokens, rows, width, dtype = shape
    options = {"device": "cuda", "dtype": getattr(torch, dtype)}
    values, indices = torch.zeros(2, rows, 2 * width, **options), torch.zeros(rows, width, device="cuda", dtype=torch.uint8)
    try:
        decode(torch.zeros(tokens, 8 * width, **options), values, indices, None, config)
        torch.cuda.synchronize()
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:100]}"
    return None
