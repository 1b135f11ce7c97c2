"""How docs/ becomes a site: hooks of mkdocs, and how the docstrings are read from which settings are generated.

Pages show the pictures of results/, by the relative links that also work where no site is built.
"""

import re
from pathlib import Path
from typing import Any

from griffe import Docstring, Extension, Object
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures to the files of the site."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links to pictures lead into the site."""
    return markdown.replace("](../results/", "](results/").replace("](../../results/", "](../results/")


class PlainDocstrings(Extension):
    """Docstrings are plain text with code between backticks: `<file>` is no tag and `*.down_proj` no emphasis."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Escape what Markdown would read as markup."""
        if isinstance(obj.docstring, Docstring):
            parts = re.split(r"(`[^`]*`)", obj.docstring.value)
            obj.docstring.value = "".join(part if part.startswith("`") else escaped(part) for part in parts)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.replace("<", "&lt;").replace("*", r"\*")
