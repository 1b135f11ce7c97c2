"""Marks of tests that need what not every machine has."""

import pytest
import torch

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies sparse rows through MKL")
