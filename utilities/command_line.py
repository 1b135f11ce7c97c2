"""Tell errors of the command line in one sentence: the setting, the value that it got, the values that it accepts.

jsonargparse reports an error as an indented tree of all types that it tried. `explain` follows the branch that the user meant,
names the setting by its full path, and looks for the most similar name.
"""

import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module

WRAPPED = ("Parser key", "Does not validate against any of the Union subtypes")
"""Beginnings of the messages that are trees."""
LONGEST = 1000
"""Largest number of characters of an error."""
BASE = 60
"""Base of the numbers that YAML writes with a colon."""
LISTED = 40
"""Largest number of names that are listed if none is similar."""


@dataclass
class Node:
    """A line of the tree and the lines that are indented below it.

    Attributes:
        text: The line without indentation.
        children: Lines one level below.
    """

    text: str
    children: list["Node"] = field(default_factory=list)


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Tell an error of jsonargparse in one sentence.

    Args:
        message: Text of the error.
        options: Option strings of the parser, such as --trainer.devices.

    Examples:
        >>> explain("unrecognized arguments: --trainer.device", ["--trainer.devices", "--trainer.precision"])
        'Unknown setting `--trainer.device`. Did you mean `--trainer.devices`?'
    """
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        return _unknown(match[1].partition("=")[0], "", sorted(options))
    if match := re.match(r"Subcommand '\w+' does not accept option '([^']+)'", message):
        names = {option.lstrip("-").partition(".")[0] for option in options if option.startswith("--")}
        return _unknown(match[1], "", sorted(names))
    if match := re.search(r"File does not exist: '?([^'\n]+)'?", message):
        return f"The config file {match[1]!r} does not exist. Check its path; shipped ones are in configs/."
    if message.startswith('expected "subcommand"'):
        return "Give a subcommand: fit, validate, test or predict. `python train.py --help` says what they do."
    if "arguments are required" in message and ".model" in message:
        return "No model is given. Give a config file, such as `--config configs/quickstart.yaml`, or `--model`."
    found = _follow(_tree(message), "") if message.startswith(WRAPPED) else None
    return found or f"{one_line(message).rstrip('.')}."


def explained(error: BaseException) -> BaseException:
    """Return an error that a class raised while jsonargparse made it; if jsonargparse has wrapped it, in one sentence."""
    return ValueError(explain(str(error))) if str(error).startswith(WRAPPED) else error


def one_line(text: str) -> str:
    """Remove line breaks from a text and cut it to `LONGEST` characters."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _tree(message: str) -> Node:
    root = Node("")
    stack = [(-1, root)]
    for line in message.splitlines():
        text = line.strip()
        if not text:
            continue
        indent = len(line) - len(line.lstrip())
        while stack[-1][0] >= indent:
            stack.pop()
        node = Node(text.removeprefix("- "))
        stack[-1][1].children.append(node)
        stack.append((indent, node))
    return root


def _follow(node: Node, path: str, owner: str = "") -> str | None:
    """Return the sentence of the first branch that has one; `path` is the setting, `owner` the class that it belongs to."""
    errors = next((child for child in node.children if child.text == "Errors:"), None)
    if errors is not None:
        nested = [child for child in errors.children if child.text.startswith(("Problem with given class_path", "Parser key"))]
        for child in nested:
            if found := _follow(Node("", [child]), path, owner):
                return found
        return _of_union(node, errors, path)
    for child in node.children:
        if match := re.match(r'Parser key "([^"]+)":(.*)', child.text):
            inner = Node("", [Node(match[2].strip()), *child.children] if match[2].strip() else child.children)
            found = _follow(inner, f"{path}.{match[1]}" if path else match[1], owner)
        elif match := re.match(r"Problem with given class_path '([^']+)':(.*)", child.text):
            inner = Node("", [Node(match[2].strip()), *child.children] if match[2].strip() else child.children)
            found = _follow(inner, path, match[1])
        else:
            found = _leaf(child.text, path, owner)
        if found:
            return found
    return None


def _leaf(text: str, path: str, owner: str) -> str | None:
    if match := re.match(r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)", text):
        return _unknown_of_class(match[1], path, owner)
    if match := re.match(r"Expected a (.+?)\. Got value: (.*)", text):
        return f"Argument `{path}` expected {_in_words(match[1])} but got {match[2]!r}.{_unquoted(match[1], match[2])}"
    if match := re.match(r"module '([^']+)' has no attribute '([^']+)'; it has (.*)", text):
        return f"Argument `{path}`: {match[1]} has no {match[2]!r}.{_similar(match[2], match[3].split(', '))}"
    if text.startswith("Argument `"):
        return text
    if re.match(r"(No module named|Unexpected import|Problem)", text):
        return f"Argument `{path}`: {one_line(text)}."
    return None


def _of_union(node: Node, errors: Node, path: str) -> str | None:
    """Explain a value that is of none of several types, or that the class among them refuses."""
    if refused := next((child.text for child in errors.children if child.text.startswith("Argument `")), None):
        return refused
    types = [child.text.removeprefix("Expected a ") for child in errors.children if child.text.startswith("Expected a ")]
    texts = [child.text for child in node.children if child.text.startswith("Given value: ")]
    given = texts[0].removeprefix("Given value: ") if texts else ""
    words = [_in_words(text) for text in types if not text.startswith("path ")]
    told = (
        f"Argument `{path}` expected {' or '.join(dict.fromkeys(words))} but got {given!r}.{_unquoted(' '.join(types), given)}"
    )
    return told if words else None


def _in_words(type_text: str) -> str:
    """Name a type in plain words."""
    if match := re.match(r"typing\.Literal\[(.*)\]", type_text):
        return f"one of {match[1]}".replace("'", "")
    if type_text.startswith("dot import path"):
        return "the path of a class"
    plain = {"float": "a number", "int": "an integer", "bool": "true or false", "str": "a text", "NoneType": "null"}
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", type_text)
    return plain.get(name, "a list" if name.lower().startswith(("list", "iterable")) else name)


def _unquoted(types: str, given: str) -> str:
    """Tell how YAML has made a number, 124, of a text without quotes, 2:4, in base 60, if such a text is accepted."""
    if not re.fullmatch(r"\d+", given) or int(given) < BASE:
        return ""
    text = ":".join(map(str, divmod(int(given), BASE)))
    if f"'{text}'" not in types and "<class 'str'>" not in types:
        return ""
    return f' Write "{text}" in quotes if this was meant: without them YAML reads the number {given}.'


def _unknown_of_class(name: str, path: str, owner: str) -> str:
    """Explain a setting that its class does not have: moved, misspelt, or a setting of another class."""
    cls = _class(owner)
    if cls is None:
        return f"Unknown setting `{path}.{name}`."
    moved = getattr(inspect.getmodule(cls), "MOVED", {})
    if name in moved:
        return f"Setting `{path}.{name}` has moved: it is `{path}.{moved[name]}` now."
    for other in (*cls.__subclasses__(), *_siblings(cls)):
        if name in _settings(other):
            return f"Setting `{path}.{name}` belongs to {other.__name__}: give `--{path} {other.__name__}` before it."
    return _unknown(f"{path}.{name}", f" of {cls.__name__}", [f"{path}.{setting}" for setting in _settings(cls)])


def _unknown(name: str, of: str, accepted: list[str]) -> str:
    prefix = name.rpartition(".")[0]
    return f"Unknown setting `{name}`{of}.{_similar(name, accepted, f'{prefix}.' if prefix else '')}"


def _similar(name: str, accepted: list[str], prefix: str = "") -> str:
    """Ask for the nearest name, or list the accepted names; the prefix that all share is left out."""
    ends = {option.removeprefix(prefix): option for option in accepted}
    near = difflib.get_close_matches(name.removeprefix(prefix), list(ends), n=1, cutoff=0.6)
    near = near or [end for end in ends if name.removeprefix(prefix) in end][:1]
    if near:
        return f" Did you mean `{ends[near[0]] if ends[near[0]].startswith('--') else near[0]}`?"
    return f" There are {', '.join(list(ends)[:LISTED])}." if len(ends) <= LISTED else ""


def _siblings(cls: type) -> list[type]:
    """Return other classes of the same base, if that is one of this project's choices."""
    base = cls.__base__
    return base.__subclasses__() if base is not None and any("Choice" in ancestor.__name__ for ancestor in base.__mro__) else []


def _settings(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]


def _class(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if inspect.isclass(found) else None
