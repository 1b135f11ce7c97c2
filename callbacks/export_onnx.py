"""ExportOnnx: writes a model as ONNX, with its zeros, and checks the file with onnxruntime.

python train.py validate --config FILE --model.model_name_or_path DIR --trainer.callbacks+=callbacks.ExportOnnx
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from callbacks.base.after_run import AfterRun
from callbacks.base.model_card import CardContent, card_of, check_place, last_metrics, share_of_zeros, sparse_tags, write_card
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.causal_lm import CausalLM
from lightning_modules.image_classifier import ImageClassifier
from lightning_modules.parts.experts import experts_of
from utilities.digest import digest
from utilities.distributed import need_whole_weights
from utilities.extras import require
from utilities.files import check_writable, move_files
from utilities.safe_load import brief

FILE = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference allowed between a logit and PyTorch's, as a share of the largest logit if that is above 1."""


class ExportOnnx(AfterRun):
    """Write the model as ONNX after `validate` or `test`, or at the end of `fit`; needs the extra `export`.

    A language model becomes input_ids (batch, sequence) -> logits (batch, sequence, vocabulary), without cache and padding
    mask. A vision transformer becomes image (batch, channels, height, width) -> logits (batch, classes). Batch and sequence may
    have any size. The file is float32, whatever the model's dtype. Its weights are beside it, in model.onnx.data.

    Args:
        output_dir: Directory of the file; `onnx` in the log directory when None.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(pl_module, (CausalLM, ImageClassifier)):
            raise TypeError(f"ExportOnnx needs a CausalLM or an ImageClassifier but got {type(pl_module).__name__}.")
        kind = pl_module.hparams.get("compressed", "none")
        if kind != "none":
            raise ValueError(
                f"Argument `compressed` = {kind} replaces linears by forms that ONNX does not have. Leave it out here."
            )
        require("export", "onnx", "onnxscript", "onnxruntime")
        need_whole_weights(trainer, type(self).__name__)
        if self.output_dir is not None:
            check_writable(Path(self.output_dir).expanduser())
        check_place(self._target(trainer))

    @override
    def after_run(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        target, metrics = self._target(trainer), last_metrics(trainer)  # every process is asked for both
        if not trainer.is_global_zero:
            return
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            difference = export_onnx(pl_module, Path(scratch) / FILE)
            write_card(Path(scratch), card_of(trainer, pl_module, _content(pl_module, metrics, difference)))
            move_files(Path(scratch), target)
        rank_zero_info(f"Model written to {target / FILE}; onnxruntime gives PyTorch's logits, to {difference:.1e}.")

    def _target(self, trainer: Trainer) -> Path:
        """Return the directory of the file. Call it in all processes: the first one tells the others its log directory."""
        return Path(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "onnx").expanduser()


def _content(module: PrunableModule, metrics: dict[str, float], difference: float) -> CardContent:
    """Write the callback's part of the model card."""
    zeros = share_of_zeros(module)
    return CardContent(
        title="ONNX",
        summary=(
            f"`{FILE}`, with its weights beside it in float32. onnxruntime gives PyTorch's logits, to {difference:.1e}. "
            "Metrics are those of the model in PyTorch."
        ),
        settings={},
        metrics={"exported": metrics},
        sparsity={} if zeros is None else {"exported": zeros},
        tags=(*sparse_tags(zeros), "onnx"),
        library="onnx",
    )


class _Logits(nn.Module):
    """A model as its module calls it, without Lightning: it maps one tensor to one tensor."""

    def __init__(self, model: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, inputs: Tensor) -> Tensor:
        return self._call(self, inputs)


@torch.inference_mode(False)  # a validation is in that mode, and what is made in it cannot be traced
@torch.no_grad()
def export_onnx(module: PrunableModule, path: Path) -> float:
    """Write a CausalLM or an ImageClassifier as ONNX and compare the file with it. The module is not changed.

    Args:
        module: Module whose model is loaded.
        path: Path of the file; its directory must exist.

    Returns:
        The largest difference between a logit of onnxruntime and PyTorch's, on inputs of another size than in the export.

    Raises:
        ValueError: If the model cannot be exported.
        RuntimeError: If the file gives other logits, or does not hold the weights of every prunable linear, zeros included.
    """
    if routed := list(experts_of(module.model)):
        raise ValueError(
            f"ExportOnnx cannot export the experts of a {type(module.model).__name__} ({routed[0]}): which of them run depends "
            "on the input. Leave the callback out."
        )
    model = _Logits(copy.deepcopy(module.model).cpu().float().eval(), type(module).forward)
    names, example, free = _inputs(module, samples=2, tokens=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries warn about themselves
        try:
            program = torch.onnx.export(
                model, (example,), dynamo=True, verbose=False, dynamic_shapes=(free,), **names, optimize=True
            )
        except Exception as error:  # torch.export and onnxscript share no base class below this one
            raise ValueError(
                f"The model cannot be exported as ONNX ({brief(error)}). Try model.attn_implementation eager or sdpa."
            ) from error
        program.save(path, external_data=True)
    check_weights(module, path)
    return check_logits(model, _inputs(module, samples=3, tokens=13)[1], path)


def _inputs(module: PrunableModule, samples: int, tokens: int) -> tuple[dict[str, list[str]], Tensor, dict[int, Any]]:
    """Return the names of input and output, random inputs, and the axes that may have any size."""
    generator, batch = torch.Generator().manual_seed(0), torch.export.Dim("batch")
    if isinstance(module, CausalLM):
        ids = torch.randint(module.model.config.vocab_size, (samples, tokens), generator=generator)
        names = {"input_names": ["input_ids"], "output_names": ["logits"]}
        return names, ids, {0: batch, 1: torch.export.Dim("sequence")}
    images = torch.randn(samples, *module.data_config["input_size"], generator=generator)
    return {"input_names": ["image"], "output_names": ["logits"]}, images, {0: batch}


def check_weights(module: PrunableModule, path: Path) -> None:
    """Check that the file has the matrix of every prunable linear, bit for bit, as it is or transposed.

    Raises:
        RuntimeError: If one is missing.
    """
    import onnx

    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]
    stored = {digest([("", torch.tensor(array))]) for array in arrays}
    for block_name, block in module.blocks.items():
        for name, linear in module.linears(block).items():
            weight = linear.module.weight.detach().float()
            if stored.isdisjoint((digest([("", weight)]), digest([("", weight.T)]))):
                raise RuntimeError(f"The ONNX file does not hold the weights of {block_name}.{name} as they are; not written.")


def check_logits(model: nn.Module, inputs: Tensor, path: Path) -> float:
    """Return the largest difference between a logit of the file and one of a model that maps one tensor to one.

    Raises:
        RuntimeError: If it is larger than TOLERANCE.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
    with torch.no_grad():
        expected = model(inputs)
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"onnxruntime gives logits that differ from PyTorch's by up to {difference:.1e}; not written.")
    return difference
