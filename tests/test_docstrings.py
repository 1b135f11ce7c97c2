"""Docstrings: whoever is public has one, and what its sections say of parameters and errors is complete."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("callbacks", "datamodules", "functional", "lightning_modules", "utilities")
ERRORS = {"ValueError", "TypeError", "RuntimeError"}
PARAMETERS = 3
"""Number of parameters from which a public function of functional/ explains them."""


@cache
def objects_of(package: str) -> list[griffe.Object]:
    """Modules, classes, functions and methods of a package that are public by their names; none that are imported."""
    loaded = griffe.load(package, search_paths=[ROOT], docstring_parser="google", docstring_options={"warnings": False})
    return list(_walk(loaded))


def _walk(found: griffe.Object) -> Iterator[griffe.Object]:
    yield found
    for member in found.members.values():
        hidden = member.name.startswith("_")
        if not (hidden or member.is_alias or member.is_attribute or found.is_function):
            yield from _walk(member)


def section_of(found: griffe.Object, kind: griffe.DocstringSectionKind) -> list | None:
    """Entries of one section of a docstring, or None without such a section."""
    sections = found.docstring.parsed if found.docstring else []
    return next((section.value for section in sections if section.kind is kind), None)


def explained_by(found: griffe.Object) -> list[str] | None:
    """Names in the `Args` of a docstring; of a dataclass or NamedTuple without them, names in its `Attributes`."""
    entries = section_of(found, griffe.DocstringSectionKind.parameters)
    if entries is None and found.is_class and ("dataclass" in found.labels or is_named_tuple(found)):
        entries = section_of(found, griffe.DocstringSectionKind.attributes)
    return None if entries is None else [entry.name.lstrip("*") for entry in entries]


def parameters_of(found: griffe.Class | griffe.Function) -> list[str]:
    """Names of the parameters of a function, or of those of a class's `__init__`, dataclass or NamedTuple."""
    if is_named_tuple(found):
        return [name for name, member in found.members.items() if member.is_attribute and "property" not in member.labels]
    names = [parameter.name for parameter in found.parameters]
    bound = found.is_class or (found.parent.is_class and "staticmethod" not in found.labels)
    return names[1:] if bound and names[:1] in (["self"], ["cls"]) else names


def is_named_tuple(found: griffe.Object) -> bool:
    """Whether a class declares its fields as a NamedTuple."""
    return found.is_class and any(str(base).endswith("NamedTuple") for base in found.bases)


def is_overriding(found: griffe.Object) -> bool:
    """Whether a method is documented where it is declared first."""
    return found.is_function and any(str(decorator.value).split(".")[-1] == "override" for decorator in found.decorators)


def functions_of(package: str) -> list[griffe.Function]:
    """Public functions and methods."""
    return [found for found in objects_of(package) if found.is_function]


@pytest.mark.parametrize("package", PACKAGES)
def test_whoever_is_public_has_a_docstring(package):
    without = [f.path for f in objects_of(package) if not is_overriding(f) and not (f.docstring and f.docstring.value)]
    assert not without, "\n".join(without)


@pytest.mark.parametrize("package", PACKAGES)
def test_args_are_the_parameters(package):
    wrong = []
    for found in objects_of(package):
        explained = explained_by(found)
        if explained is None or found.is_module:
            continue
        has = parameters_of(found)
        if explained != has:
            wrong.append(f"{found.path} explains {', '.join(explained)} but has {', '.join(has)}")
    assert not wrong, "\n".join(wrong)


def test_functions_of_many_parameters_explain_them():
    args = griffe.DocstringSectionKind.parameters
    without = [
        found.path
        for found in functions_of("functional")
        if len(parameters_of(found)) >= PARAMETERS and section_of(found, args) is None and not is_overriding(found)
    ]
    assert not without, "\n".join(without)


def test_functions_name_the_errors_that_they_raise():
    wrong = []
    for found in functions_of("functional"):
        section = section_of(found, griffe.DocstringSectionKind.raises) or []
        named = {str(entry.annotation) for entry in section}
        wrong += [f"{found.path}: raises {name}" for name in sorted(raised_in(found.source) - named)]
    assert not wrong, "\n".join(wrong)


def raised_in(source: str) -> set[str]:
    """Names of `ERRORS` that a function raises in its own body, not those of functions within it."""
    names, waiting = set(), list(ast.parse(source).body[0].body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            names |= {node.exc.func.id} & ERRORS
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    return names
