"""Former arguments of a class are refused with the present name; all others pass, and the signature stays."""

import inspect

import pytest

from utilities.moved import refuse_moved


class Thing:
    @refuse_moved({"old": "new"})
    def __init__(self, first: int, new: str = "a") -> None:
        """Make it."""
        self.given = first, new


def test_the_present_name_is_named():
    with pytest.raises(ValueError, match="`old` has moved: it is `new` now"):
        Thing(1, old="b")
    assert Thing(1).given == (1, "a") and Thing(1, "b").given == (1, "b") and Thing(first=1, new="b").given == (1, "b")
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        Thing(1, other=2)


def test_the_signature_and_the_docstring_stay():
    assert list(inspect.signature(Thing).parameters) == ["first", "new"] and Thing.__init__.__doc__ == "Make it."
