"""Find the fastest configuration of the decoding kernels for a shape: `python -m benchmarks.sparse24 --part tune`."""

import itertools
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import torch
from torch import nn

from benchmarks.cuda_graphs import captured, cold_copies, seconds
from functional.sparse24 import Config, decode, default_config, split
from functional.sparse24.config import possible
from lightning_modules.parts.linear24 import Linear24
from lightning_modules.parts.split_linear import SplitLinear

TILES, WARPS, UNROLL = (1, 2, 4), (2, 4, 8, 16), (2, 4, 8)
WORDS_IN_FLIGHT = (64, 512)
"""Least and largest number of weight words in flight, per program and thread of a warp: fewer do not hide the memory's latency,
more do not fit."""
COMPILERS = 12
SHOWN = 5
REPLAYS = 7


def grid(has_rest: bool = False) -> list[Config]:
    """Return configurations that could be fast, in a random order that is always the same."""
    found = [Config(*sizes) for sizes in itertools.product(TILES, WARPS, UNROLL)]
    least, most = WORDS_IN_FLIGHT
    found = [config for config in found if possible(config, has_rest)]
    found = [config for config in found if least <= 8 * config.tiles * config.warps * config.unroll <= most]
    random.Random(0).shuffle(found)
    return found


def tune(linear: nn.Linear, name: str, tokens: int, budget: float) -> list[tuple[float, Config]]:
    """Try configurations for some seconds after they were compiled; print the fastest, and the default's place.

    Returns:
        Seconds of a call and configuration, fastest first.
    """
    has_rest = not Linear24.fits(linear)
    compressed = (SplitLinear if has_rest else Linear24).from_linear(linear)
    x = torch.randn(tokens, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)
    default = default_config(tokens, *linear.weight.shape, has_rest)
    configs = [default, *grid(has_rest)]
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
            y = product(x, compressed, config).float()
            run = captured(lambda config=config: [product(x, turn, config) for turn in turns], x.device)
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


def product(x: torch.Tensor, linear: Linear24 | SplitLinear, config: Config) -> torch.Tensor:
    """Multiply with a configuration."""
    return decode(x, linear.compressed, None, config, getattr(linear, "rest", None))


@cache
def compilers() -> ProcessPoolExecutor:
    """Processes of their own, since compiling takes most of the time; they stay for the next shape."""
    return ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn"))


def compiled(configs: list[Config], x: torch.Tensor, linear: Linear24 | SplitLinear) -> list[Config]:
    """Those that could be compiled; they are in Triton's cache on disk then."""
    begin = time.monotonic()
    rounds = linear.rounds if isinstance(linear, SplitLinear) else 0
    shape = (len(x), linear.out_features, linear.in_features, str(x.dtype).removeprefix("torch."), rounds)
    jobs = {config: compilers().submit(compile_one, config, shape) for config in dict.fromkeys(configs)}
    problems = {config: job.result() for config, job in jobs.items()}
    for config, problem in problems.items():
        if problem:
            print(f"  {config}: {problem}", flush=True)
    print(f"{len(jobs)} kernels compiled in {time.monotonic() - begin:.0f} s", flush=True)
    return [config for config, problem in problems.items() if problem is None]


def compile_one(config: Config, shape: tuple) -> str | None:
    """Run one configuration once on zeros; None if it went well, else what went wrong."""
    tokens, rows, columns, dtype, rounds = shape
    options = {"device": "cuda", "dtype": getattr(torch, dtype)}
    main, rest = split(torch.zeros(rows, columns, **options))
    try:
        rest = rest._replace(rounds=rounds) if rounds else None
        decode(torch.zeros(tokens, columns, **options), main, None, config, rest)
        torch.cuda.synchronize()
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:100]}"
    return None
