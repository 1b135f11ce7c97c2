"""Norms over tokens and the largest magnitude of a batch in one GPU kernel, which reads the batch once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEATURES, TOKENS = 128, 32
"""Size of the tile that a program reads at a time."""


@triton.jit
def _norm_kernel(
    x_ptr, norm_ptr, peak_ptr, tokens, features, sample_stride, token_stride, feature_stride,
    FEATURES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    column = x_ptr + sample * sample_stride + feature.to(tl.int64) * feature_stride
    squares = tl.zeros((TOKENS, FEATURES), tl.float32)  # summed at the end only: that synchronises the warps
    peaks = tl.zeros((TOKENS, FEATURES), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = (token[:, None] < tokens) & (feature[None, :] < features)
        x = tl.load(column[None, :] + token[:, None].to(tl.int64) * token_stride, mask=inside, other=0.0).to(tl.float32)
        squares += x * x
        peaks = tl.maximum(peaks, tl.abs(x))
    square = tl.sum(squares, 0)
    peak = tl.where(square == square, tl.max(peaks, 0), square)  # a maximum may pass over NaN
    out = sample * features + feature
    tl.store(norm_ptr + out, tl.sqrt_rn(square), mask=feature < features)
    tl.store(peak_ptr + out, peak, mask=feature < features)


def norms_and_peak(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖X_n,j‖ over the tokens, float32, (samples, features), and the largest magnitude, NaN if x holds any.

    Args:
        x: (samples, tokens, features), not empty, float16, bfloat16 or float32, with any strides.
    """
    samples, tokens, features = x.shape
    norm, peak = torch.empty(2, samples, features, dtype=torch.float32, device=x.device)
    _norm_kernel[(samples, triton.cdiv(features, FEATURES))](
        x, norm, peak, tokens, features, *x.stride(), FEATURES=FEATURES, TOKENS=TOKENS, num_warps=4
    )
    return norm, peak.amax()
