"""Turn a compressed directory into a plain one, which any library reads.

    python -m lightning_modules.expand DIR OUT

DIR is what `save_compressed: true` has written. OUT, which must not exist or be empty, gets the same weights as transformers
stores them, and a copy of every other file. It appears when it is finished.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.parts.compressed_files import MARK, expand_weights, is_compressed
from utilities.files import OutputDirectory


def expand(directory: Path, output: Path) -> None:
    """Write a plain directory of the same model.

    Args:
        directory: A compressed directory.
        output: The plain one; new, or empty.

    Raises:
        ValueError: If the first is not compressed, or damaged, or the second has files.
        OSError: If it cannot be written, as on a full disk.
    """
    if not directory.is_dir() or not is_compressed(directory):
        raise ValueError(f"Argument DIR expected a directory with compressed weights but {str(directory)!r} has no {MARK}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"Argument OUT expected a new or empty directory but {str(output)!r} is not. Give another.")
    target = OutputDirectory(output)
    target.open()
    try:
        target.publish(lambda new: _write(directory, new))
    finally:
        target.close()


def _write(directory: Path, new: Path) -> None:
    expand_weights(directory, new)
    for path in directory.iterdir():
        if path.is_file() and not (path.name == MARK or (path.name.startswith("compressed") and ".safetensors" in path.name)):
            shutil.copyfile(path, new / path.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("output", metavar="OUT", type=Path)
    options = parser.parse_args(arguments)
    try:
        expand(options.directory.expanduser(), options.output.expanduser())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Plain model written to {options.output}.")


if __name__ == "__main__":
    main()
