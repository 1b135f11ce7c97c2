"""Checksums: the same bits give the same number, any other bits another."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from utilities.digest import checksum


@given(
    size=st.integers(1, 40), where=st.integers(0, 39), bit=st.integers(0, 15), dtype=st.sampled_from(["float16", "bfloat16"])
)
def test_one_changed_bit_changes_it(size, where, bit, dtype):
    x = torch.arange(size, dtype=torch.float32).to(getattr(torch, dtype))
    y = x.clone()
    y.view(torch.int16)[where % size] ^= torch.tensor(1 << bit).to(torch.int16)
    assert checksum([x]) == checksum([x.clone()]) != checksum([y])


def test_order_number_and_layout_of_tensors():
    a, b = torch.randn(3, 5), torch.randn(7)
    assert checksum([a, b]) != checksum([b, a]) and checksum([a]) != checksum([a, b]) and checksum([]) == ""
    assert checksum([a.T.contiguous().T]) == checksum([a]), "bits in the order of rows, wherever they lie"
    swapped = a.clone()
    swapped[0], swapped[1] = a[1], a[0]
    assert checksum([swapped]) != checksum([a])
