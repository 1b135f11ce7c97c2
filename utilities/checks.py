"""Checks of settings, whose errors name the argument, what it expected and what it got."""

from math import inf


def check_one_of(argument: str, value: object, accepted: tuple[object, ...]) -> None:
    """Check that a value is one of those accepted.

    Args:
        argument: Name of the setting, for the error.
        value: Value of the setting.
        accepted: Accepted values.

    Raises:
        ValueError: If it is none of them.
    """
    if value not in accepted:
        raise ValueError(f"Argument `{argument}` expected to be one of {', '.join(map(str, accepted))} but got {value!r}.")


def check_integer(argument: str, value: object, least: int, hint: str = "") -> None:
    """Check that a value is an integer of at least `least`.

    Args:
        argument: Name of the setting, for the error.
        value: Value of the setting.
        least: Smallest accepted value.
        hint: What else to know, or to do next, for the error.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        end = f"; {hint}." if hint else "."
        raise ValueError(f"Argument `{argument}` expected to be an integer of at least {least} but got {value!r}{end}")


def check_share(argument: str, value: float) -> None:
    """Check that a value is in [0, 1].

    Args:
        argument: Name of the setting, for the error.
        value: Value of the setting.

    Raises:
        ValueError: If it is not.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"Argument `{argument}` expected to be in [0, 1] but got {value}.")


def check_at_least_zero(argument: str, value: float) -> None:
    """Check that a value is a finite number of at least 0.

    Args:
        argument: Name of the setting, for the error.
        value: Value of the setting.

    Raises:
        ValueError: If it is not.
    """
    if not 0 <= value < inf:
        raise ValueError(f"Argument `{argument}` expected to be at least 0 and finite but got {value}.")
