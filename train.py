"""One command line for everything: python train.py fit|validate|test|predict --config configs/….yaml

    python train.py fit --config configs/quickstart.yaml             prune the small model that a Python package ships
    python train.py validate --config configs/quickstart.yaml --model.model_name_or_path DIR
    python train.py fit --config FILE --print_config                 every setting with its value

Any setting of the file can be given on the command line, e.g. --data.seq_len 1024 --trainer.devices 1.
"""

from lightning.pytorch.cli import LightningCLI


class CLI(LightningCLI):
    """LightningCLI with subclass mode for model and data; the model's path is also where data finds its tokenizer."""

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        data = self.datamodule.hparams if self.datamodule is not None else {}
        if data.get("tokenizer", "") is None:
            data["tokenizer"] = self.model.hparams["model_name_or_path"]


def main(args: list[str] | None = None, run: bool = True) -> CLI:
    """Run one command; `args` instead of the process's own, and `run=False` to stop once everything is instantiated."""
    return CLI(
        args=args,
        run=run,
        seed_everything_default=0,
        trainer_defaults={
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "logs"}}
        },
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()
