"""Read pickles of others without running them: tensors, arrays and plain values, never anything else."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable by which torch.load refuses to unpickle objects even if its caller, a library, asks for it."""

ARRAYS = {
    "builtins": {"object", "list", "dict", "set"},
    "collections": {"defaultdict", "OrderedDict"},
    "copyreg": {"_reconstructor"},
    "__builtin__": {"object", "list", "dict", "set"},  # Python 2's name, as is the next
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
"""Module -> names in pickles of numpy arrays, scipy's sparse matrices, dictionaries and lists; all of them only hold data."""


def brief(error: BaseException, length: int = 300) -> str:
    """Return an exception as one short line.

    Args:
        error: Error of a library about a file that is damaged or refused.
        length: Largest number of characters.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= length else f"{text[:length]}..."


@contextmanager
def weights_only() -> Iterator[None]:
    """Keep torch.load of any library from unpickling objects within the context."""
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
    """Check that a pickle holds only arrays and plain values.

    Raises:
        UnpicklingError: If it holds anything else.
    """
    with open(path, "rb") as file:
        _Arrays(file, encoding="latin1").load()


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if name not in ARRAYS.get(module, ()):
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is no data and was not made")
        return super().find_class(module, name)
