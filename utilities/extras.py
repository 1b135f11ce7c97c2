"""Optional packages: asked for before a run starts, with the command that installs them."""

from importlib.util import find_spec


def require(extra: str, *packages: str) -> None:
    """See that packages of an extra of pyproject.toml are installed; none is imported.

    Args:
        extra: lora, eval or export.
        packages: As they are imported.

    Raises:
        ModuleNotFoundError: Naming those that are missing and what installs them.
    """
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ModuleNotFoundError(f"{', '.join(missing)} is not installed. Run `pip install '.[{extra}]'`.", name=missing[0])
