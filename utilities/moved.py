"""Refuse former arguments of a class in Python; utilities/command_line.py does so for the command line."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

Init = Callable[..., None]


def refuse_moved(moved: Mapping[str, str]) -> Callable[[Init], Init]:
    """Return a decorator of an `__init__` that names the present argument if a former one is given.

    Args:
        moved: Former argument -> its present name.
    """

    def decorate(init: Init) -> Init:
        @functools.wraps(init)  # jsonargparse reads the arguments through this
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            if former := next((name for name in kwargs if name in moved), None):
                raise ValueError(f"Argument `{former}` has moved: it is `{moved[former]}` now.")
            init(self, *args, **kwargs)

        return checked

    return decorate
