"""Shared by the data modules: checks of settings, and imports of packages that are not always installed."""

from importlib import import_module
from types import ModuleType


def check_int(name: str, value: object, least: int) -> None:
    """Raise a ValueError if a setting is no integer, or a too small one.

    Args:
        name: Name of the setting.
        value: Its value.
        least: Smallest value that is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"Argument `{name}` expected to be an integer of at least {least} but got {value!r}; set it to {least} or more."
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
