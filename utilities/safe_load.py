"""Reading what others have pickled without running it: tensors, arrays and plain values, never anything else."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""What torch.load asks: whether to refuse to unpickle objects even where the caller, a library, tells it to."""

ARRAYS = {
    "builtins": {"object", "list", "dict", "set"},
    "collections": {"defaultdict", "OrderedDict"},
    "copyreg": {"_reconstructor"},
    "__builtin__": {"object", "list", "dict", "set"},  # of Python 2, as is the next
    "copy_reg": {"_reconstructor"},
    "_codecs": {"encode"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "scipy.sparse.csr": {"csr_matrix"},
    "scipy.sparse._csr": {"csr_matrix"},
}
"""What pickles of numpy arrays, scipy's sparse matrices, dictionaries and lists name; none of it does more than hold data."""


def brief(error: BaseException, length: int = 300) -> str:
    """An exception in one line of no great length: what libraries say of a damaged file, or of one that they refuse."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= length else f"{text[:length]}..."


@contextmanager
def weights_only() -> Iterator[None]:
    """While open, no torch.load of any library unpickles an object."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


def check_arrays(path: Path) -> None:
    """Raise an UnpicklingError if a pickle holds anything but arrays and plain values."""
    with open(path, "rb") as file:
        _Arrays(file, encoding="latin1").load()


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if name not in ARRAYS.get(module, ()):
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is no data and was not made")
        return super().find_class(module, name)
