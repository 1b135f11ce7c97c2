"""Optional packages: asked for before a run starts, with the command that installs them."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def require(extra: str, *packages: str) -> None:
    """Check that packages of an extra of pyproject.toml are installed, without importing them.

    Args:
        extra: lora, eval or export.
        packages: Names of the packages as they are imported.

    Raises:
        ModuleNotFoundError: Naming those that are missing and what installs them.
    """
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} is not installed. Run `pip install --editable '.[{extra}]'`.", name=missing[0]
        )


def import_needed(module: str, needed_for: str, package: str) -> ModuleType:
    """Import a module of a package that is not always installed.

    Args:
        module: Name of the module.
        needed_for: Data that it reads, for the error.
        package: Package that pip installs, for the error.

    Raises:
        ModuleNotFoundError: If it is not installed; the message has the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        message = f"Reading {needed_for} needs the package {error.name!r}: pip install {package}"
        raise ModuleNotFoundError(message, name=error.name) from error
