"""One command line for everything: python train.py fit|validate|test|predict --config configs/….yaml

    python train.py fit --config configs/quickstart.yaml             prune the small model that a Python package ships
    python train.py validate --config configs/quickstart.yaml --model.model_name_or_path DIR
    python train.py fit --config FILE --print_config                 every setting with its value

Any setting of the file can be given on the command line, e.g. --data.seq_len 1024 --trainer.devices 1. After a training run
was interrupted, the same command with --ckpt_path last goes on with it.
"""

import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

SUBCOMMANDS = {
    "fit": "prune a model, or train one",
    "validate": "measure on held-out data",
    "test": "measure on test data",
    "predict": "write what the model makes of held-out data",
}


def print_help() -> None:
    """Print the help of the command itself; called before the imports that take seconds."""
    import argparse

    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = "each lists its options: train.py fit --help"
    commands = parser.add_subparsers(title="subcommands", metavar=f"{{{','.join(SUBCOMMANDS)}}}", description=listed)
    for name, text in SUBCOMMANDS.items():
        commands.add_parser(name, help=text)
    parser.print_help()


if __name__ == "__main__" and sys.argv[1:] in (["--help"], ["-h"]):
    print_help()
    sys.exit()

# E402: these imports take seconds, and `--help` alone has been answered without them.
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.utilities.exceptions import SIGTERMException  # noqa: E402

from utilities.command_line import explain, explained  # noqa: E402
from utilities.failures import failures_in_one_sentence  # noqa: E402
from utilities.quiet import quiet  # noqa: E402
from utilities.safe_load import brief, weights_only  # noqa: E402


class Parser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Name the wrong setting in one sentence and exit with 2, unless jsonargparse only tries a type."""
        if not self.exit_on_error:
            return super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [option for action in parser._actions for option in action.option_strings]
        self.exit(2, f"error: {explain(message, options)}\n")


class CLI(LightningCLI):
    """LightningCLI with subclass mode for model and data."""

    def _parse_ckpt_path(self) -> None:
        """Read the checkpoint as Lightning does, with an error that names it."""
        try:
            super()._parse_ckpt_path()
        except Exception as error:  # the bytes of the file may raise anything
            path = self.config[self.config.subcommand].ckpt_path
            raise ValueError(
                f"Argument `ckpt_path` expected a checkpoint of Lightning but {path!r} could not be read as one "
                f"({type(error).__name__}). Give another, such as checkpoints/last.ckpt of a run; models that were saved as a "
                "directory go into model.model_name_or_path."
            ) from error

    def before_instantiate_classes(self) -> None:
        """Resolve `ckpt_path: last` to the newest last.ckpt of the logger's runs, and log to the folder of that run.

        Lightning would look in the folder of this run, which is new and empty.
        """
        config = self.config.get(self.subcommand) if self.subcommand else None
        if config is None or config.get("ckpt_path") != "last":
            return
        logger = config.trainer.logger
        options = logger.get("init_args", {}) if hasattr(logger, "get") else {}
        if not options.get("save_dir") or options.get("version") is not None:
            return
        folder = Path(options["save_dir"], options.get("name") or "")
        found = sorted(folder.glob("version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        if found:
            config.ckpt_path, options["version"] = str(found[-1]), found[-1].parents[1].name
        elif self.subcommand != "fit":
            raise ValueError(
                f"Argument `ckpt_path` = last: no run in {folder} has written checkpoints/last.ckpt. Give the path of a "
                "checkpoint, or train first with a ModelCheckpoint whose filename is last."
            )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            if error.__cause__ is None:
                raise
            raise explained(error.__cause__) from None  # the error of our class, without all types that jsonargparse tried


def main(args: list[str] | None = None, run: bool = True) -> CLI:
    """Run one command.

    Args:
        args: Words of the command line; those of the process when None.
        run: Whether to run the subcommand; if not, everything is only instantiated.
    """
    quiet()
    try:
        with weights_only():  # whatever `--weights_only` says: a checkpoint needs no objects, and theirs could run anything
            return CLI(
                args=args,
                run=run,
                parser_class=Parser,
                seed_everything_default=0,
                trainer_defaults={
                    "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "logs"}}
                },
                save_config_kwargs={"overwrite": True},
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Argument `ckpt_path` expected a checkpoint of tensors and plain values, but it holds others or is damaged "
            f"({brief(error, 120)}). Nothing of it was run. Give another."
        ) from error


@contextmanager
def exit_codes() -> Iterator[None]:
    """Exit with 143, as shells expect, if SIGTERM ends the run; Lightning's exception alone would exit with 0."""
    try:
        yield
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    with exit_codes(), failures_in_one_sentence():
        main()
