"""Choice: a setting that is one of several classes, each of which accepts only its own settings.

A config names a choice by its short name, `update_rule: attention`, or with settings,

    update_rule:
      class_path: AttentionRule
      init_args:
        candidates: all
"""

from typing import Any, ClassVar, TypeVar


class Choice:
    """Base of choices. The public attributes that `__init__` stores are the settings."""

    short: ClassVar[str]
    """Name in configs."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def as_dict(self) -> dict[str, Any]:
        """Return class path and settings as in a config."""
        return {"class_path": type(self).__name__, "init_args": self.settings}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"


C = TypeVar("C", bound=Choice)


def chosen(argument: str, value: str | C, base: type[C]) -> C:
    """Make the choice that a short name stands for, with default settings; a choice is returned as it is.

    Args:
        argument: Name of the setting, for the error.
        value: Short name, or a choice.
        base: Base class of the accepted choices.

    Raises:
        ValueError: If the name is unknown or the value is neither a name nor a choice of this kind.
    """
    if isinstance(value, base):
        return value
    classes = {cls.short: cls for cls in base.__subclasses__()}
    if not isinstance(value, str) or value not in classes:
        names = ", ".join(f"{short} ({cls.__name__})" for short, cls in classes.items())
        raise ValueError(f"Argument `{argument}` expected to be one of {names} but got {value!r}.")
    return classes[value]()
