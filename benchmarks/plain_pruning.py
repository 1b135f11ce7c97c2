"""The plain variant of D²Prune that prune_speed.py measures against: no batching, no sharing, no kernels.

One sequence at a time; a float32 Gram matrix for every linear, also where several read the same tensor; Cholesky, inverse and
Cholesky again; a loop over columns with a full sort for every 128 of them. The mathematics is functional.pruning's (rms norms,
λ2 = 0); nothing of it is used.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


class PlainStatistics:
    """Sums of one linear."""

    def __init__(self, linear: nn.Linear) -> None:
        device = linear.weight.device
        self.gram = torch.zeros(linear.in_features, linear.in_features, device=device)
        self.inputs = torch.zeros(linear.in_features, device=device)
        self.outputs = torch.zeros(linear.out_features, device=device)
        self.samples = 0

    def add(self, module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        """Take one sequence, as a forward hook."""
        x, y = args[0].reshape(-1, args[0].shape[-1]).float(), output.reshape(-1, output.shape[-1]).float()
        self.gram += x.T @ x
        self.inputs += x.square().sum(0)
        self.outputs += y.square().sum(0)
        self.samples += 1


def plain_solve(
    weight: Tensor, statistics: PlainStatistics, tokens: int, sparsity: float, updates: bool, width: int = 128
) -> Tensor:
    """The pruned weight, float32; without `updates` Wanda's."""
    w, count = weight.float().clone(), statistics.samples
    if not updates:
        scores = w.abs() * (statistics.inputs / count).sqrt()
        w.scatter_(1, torch.sort(scores, dim=1, stable=True).indices[:, : int(w.shape[1] * sparsity)], 0)
        return w
    hessian = statistics.gram * (2 / count)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    x_norm, y_norm = (sums.div(count * tokens).sqrt() for sums in (statistics.inputs, statistics.outputs))
    for start in range(0, w.shape[1], width):
        end = min(start + width, w.shape[1])
        block, errors = w[:, start:end].clone(), torch.zeros_like(w[:, start:end])
        local = factor[start:end, start:end]
        scores = block.square() / local.diagonal().square() + y_norm[:, None] * block.abs() * x_norm[start:end]
        threshold = torch.sort(scores.flatten()).values[int(scores.numel() * sparsity)]
        drop = scores < threshold
        for j in range(end - start):
            kept = torch.where(drop[:, j], 0.0, block[:, j])
            errors[:, j] = (block[:, j] - kept) / local[j, j]
            block[:, j:] -= errors[:, j : j + 1] * local[j, j:]
            block[:, j] = kept
        w[:, start:end] = block
        w[:, end:] -= errors @ factor[start:end, end:]
    return w


@torch.no_grad()
def plain_block(
    run: Callable[[Tensor], Tensor],
    linears: dict[str, nn.Linear],
    hidden: list[Tensor],
    sparsity: float,
    updates: Callable[[str], bool],
    wait: Callable[[], None],
) -> dict[str, float]:
    """Prune one block.

    Args:
        run: The block, from hidden states (1, tokens, features) to the next.
        linears: Name -> linear of the block.
        hidden: Sequences, replaced by the outputs of the pruned block.
        sparsity: Share of zeros.
        updates: Returns whether a linear, by its name, is updated.
        wait: Waits for the device.

    Returns:
        Seconds of statistics, solve and propagation.
    """
    found = {name: PlainStatistics(linear) for name, linear in linears.items()}
    handles = [linear.register_forward_hook(found[name].add) for name, linear in linears.items()]
    start, seconds = time.perf_counter(), {}

    def lap(name: str) -> None:
        nonlocal start
        wait()
        seconds[name], start = time.perf_counter() - start, time.perf_counter()

    for x in hidden:
        run(x)
    for handle in handles:
        handle.remove()
    lap("statistics")
    for name, linear in linears.items():
        linear.weight.copy_(plain_solve(linear.weight, found[name], hidden[0].shape[1], sparsity, updates(name)))
    lap("solve")
    for i, x in enumerate(hidden):
        hidden[i] = run(x)
    lap("propagation")
    return seconds
