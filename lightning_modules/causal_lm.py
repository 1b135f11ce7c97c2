"""CausalLM: a Hugging Face causal language model with its perplexity, prunable block by block.

Perplexity is the exponential of the mean next-token loss over all windows, from float32 logits, as in the SparseGPT line of
work: no token is added, and all windows have one length.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.attention_form import attention_form
from lightning_modules.parts.compressed_linears import MANY, ONE, Kind, compress_model
from lightning_modules.parts.discovery import Discovery, discover
from lightning_modules.parts.language_models import check_given, load_model, load_tokenizer, read_config
from lightning_modules.parts.load_streamed import check_stage, discover_streamed, load_streamed
from lightning_modules.parts.predictions import Predictions
from lightning_modules.parts.self_text import sample_batch, start_token
from lightning_modules.parts.streamed_passes import StreamedPasses
from lightning_modules.parts.vision_language import copy_processor
from utilities.checks import check_one_of
from utilities.contract import ModelFacts, WritesText, data_of
from utilities.moved import refuse_moved

PRINTED = 4
"""Number of continuations that `predict` prints; all of them are written."""
PROMPT_SHOWN = 16
"""Number of tokens of the prompt that are printed before a continuation."""

DISCOVERY_TOKENS = 24
"""Length of the window that a model which is in no table is run on."""
LARGEST_LOSS = 88.0
"""Largest loss whose exponential float32 holds; the loss itself is logged beside the perplexity."""
MOVED = {"sparse24": "compressed (2:4 in place of true)"}
"""Former settings of `CausalLM` -> their present names, for errors."""


class CausalLM(PrunableModule, WritesText):
    """A causal language model for pruning, fine-tuning and evaluation; of a vision-language model the text tower is pruned.

    Weights are loaded when a run starts, not when the object is made. Any family can be evaluated and trained. Those in
    `lightning_modules.parts.architectures.ARCHITECTURES` can be pruned, and others whose blocks can be discovered.

    Args:
        model_name_or_path: A hub id, a directory, a .gguf file (dequantised), or package://<python package>/<file>. Adapters
            that lie in the directory beside the weights are added. From Python also a model of transformers, which is
            changed in place.
        dtype: Dtype of the weights; auto keeps that of the checkpoint (float32 for GGUF).
        attn_implementation: Attention of transformers (sdpa, eager, flash_attention_2); transformers chooses when None.
        learning_rate: Learning rate of AdamW, for ordinary training.
        max_new_tokens: Length of the continuations that `predict` writes.
        compressed: Form of the linears of the blocks after loading, for validate, test and predict. 2:4: those that are 2:4
            take 9/16 of their memory at 16 bit (`Linear24`), and on a GPU `predict` reads no more than that for up to 16
            windows in a batch. unstructured: those with enough zeros, on a GPU at 16 bit in lanes (`LaneLinear`), which
            `predict` multiplies without unpacking; else as a bit for every weight and the values (`SparseLinear`), on a CPU
            as sparse rows where these are faster (`CsrLinear`). auto: each takes the form that is fastest on this device,
            perhaps dense, or on a GPU a 2:4 matrix and the rest (`SplitLinear`), by times that are measured once and kept in a
            cache file: for predict with a token for each window of a batch, for validate and test with many. none leaves all
            dense. In `predict` linears that share their input
            become one product.
        static_cache: Whether `predict` keeps keys and values in a cache of fixed size. On a GPU transformers then compiles a
            step, once for each batch size, so that launching kernels no longer limits the speed.
        stream: Whether blocks stay in their safetensors files and are read when they are needed, for models that are larger
            than memory: `fit` with BlockwisePruning, `validate` and `test`.

    Raises:
        ValueError: If an argument is out of range, or does not apply to a model in memory.
    """

    reads_compressed = True

    @refuse_moved(MOVED)
    def __init__(
        self,
        model_name_or_path: str | nn.Module,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        attn_implementation: str | None = None,
        learning_rate: float = 1e-5,
        max_new_tokens: int = 64,
        compressed: Kind = "none",
        static_cache: bool = False,
        stream: bool = False,
    ) -> None:
        super().__init__()
        check_one_of("compressed", compressed, get_args(Kind))
        if stream and compressed != "none":
            raise ValueError(
                f"Argument `compressed` = {compressed} compresses blocks in memory, but `stream` = True leaves them in their "
                "files. Leave one of them out."
            )
        for name, value, least in (("learning_rate", learning_rate, 0), ("max_new_tokens", max_new_tokens, 1)):
            if not value >= least:
                raise ValueError(f"Argument `{name}` expected to be at least {least} but got {value}.")
        given = model_name_or_path if isinstance(model_name_or_path, nn.Module) else None
        if given is not None:
            check_given(given, dtype, attn_implementation, stream)
        self.save_hyperparameters(ignore=["model_name_or_path"] if given is not None else [])
        self.path = given.name_or_path if given is not None else str(model_name_or_path)
        """Path or hub id that the model was loaded from; empty for a model that was made in memory."""
        self.model: nn.Module | None = given
        self.tokenizer: Any = None
        self.metrics = nn.ModuleDict({"val": MeanMetric(), "test": MeanMetric()})
        self._predictions = Predictions()
        self._passes: StreamedPasses | None = None
        """Batches of a streamed model in validation or test."""
        self._ready = False

    @property
    def family(self) -> str:
        """`model_type` of transformers."""
        return self.model.config.model_type

    @property
    def streams(self) -> bool:
        """Whether blocks are read when they are needed."""
        return self.hparams.stream

    def configure_model(self) -> None:
        """Load tokenizer and weights, once."""
        self._check_compressed()
        if self.streams:
            check_stage(self._trainer, prunes=self.calibration_step is not None)
        if self._ready:
            return
        config = read_config(self.path) if self.model is None else self.model.config
        self._check_length(config)
        self.tokenizer = load_tokenizer(self.path) if self.path else None
        if self.tokenizer is None:
            self.tokenizer = data_of(self._trainer).facts().tokenizer
        if self.model is None:
            given = self.path, self.hparams.dtype, self.hparams.attn_implementation
            self.model, self.streamed = load_streamed(*given) if self.streams else (load_model(*given), None)
        if self._compresses:
            self._compress()
        self._ready = True

    def discover(self) -> Discovery:
        """Find blocks and linears by running the model on one window.

        Raises:
            ValueError: If they cannot be verified.
        """
        ids = torch.arange(DISCOVERY_TOKENS, device=self.model.device)[None] % self.model.config.get_text_config().vocab_size
        given = self.model, lambda: self.model(input_ids=ids, use_cache=False).logits, self.family
        return discover(*given) if self.streamed is None else discover_streamed(*given)

    def model_facts(self) -> ModelFacts:
        """Return facts with the tokenizer, or with the path that one can be loaded from."""
        return ModelFacts(tokenizer=self.tokenizer or self.path or None)

    def described(self) -> dict[str, Any]:
        """Return the hyperparameters, and the class of a model in memory."""
        return {"model_name_or_path": self.path or type(self.model).__name__, **super().described()}

    @property
    def _compresses(self) -> bool:
        return self.hparams.compressed != "none"

    def _check_compressed(self) -> None:
        """Refuse `fit` with compressed linears before weights are read."""
        if self._compresses and self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            raise ValueError(
                f"Argument `compressed` = {self.hparams.compressed} is for validate, test and predict, but this is fit: "
                "pruning and training need dense weights. Leave it out; it takes effect when the saved model is loaded."
            )

    def _compress(self) -> None:
        """Replace linears of the blocks by compressed ones."""
        device = None if self._trainer is None else self._trainer.strategy.root_device  # faster on a GPU
        evaluates = self._trainer is not None and self._trainer.state.fn != TrainerFn.PREDICTING
        given = list(self.blocks.values()), self.hparams.compressed, self.path, self.model.dtype, device
        if evaluates:
            compress_model(*given, MANY)
        else:
            self.model.eval()  # a layer that is dropped calls no linear
            windows = data_of(self._trainer).facts().batch_size  # a step multiplies a token of each
            compress_model(*given, windows or ONE, self._run_two_tokens)

    def _run_two_tokens(self) -> None:
        """Run the model where it was loaded, on the host, where flash attention does not run."""
        ids = torch.arange(2, device=self.model.device)[None]
        with attention_form(self.model, "own"):
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    def _check_length(self, config: Any) -> None:
        """Refuse windows longer than the positions that a model has learned; warn if positions are rotary."""
        config, seq_len = config.get_text_config(), data_of(self._trainer).facts().tokens
        limit = getattr(config, "max_position_embeddings", None)
        if seq_len is None or limit is None:
            return
        argument = "`seq_len`"
        if self.trainer.state.fn == TrainerFn.PREDICTING:
            argument, seq_len = "`seq_len` / 2 + `max_new_tokens`", seq_len // 2 + self.hparams.max_new_tokens
        rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        if rotary or hasattr(config, "rope_theta"):
            stretch = rotary.get("factor") if isinstance(rotary, dict) else None
            if seq_len > limit * max(stretch or 1, 1):
                rank_zero_warn(
                    f"Argument {argument} = {seq_len} is more than the {limit} positions with which {self.path} "
                    "was trained; its perplexity suffers. Lower data.seq_len unless this is meant."
                )
        elif seq_len > limit:
            raise ValueError(
                f"Argument {argument} expected to be at most {limit}, the positions that {self.path} has "
                f"learned, but got {seq_len}. Lower data.seq_len."
            )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits, (samples, tokens, vocabulary)."""
        return self.model(input_ids=input_ids, use_cache=False).logits

    def window_losses(self, input_ids: Tensor) -> Tensor:
        """Return the mean next-token loss of each window in nats, float32, (samples,)."""
        return _losses_of(self(input_ids), input_ids)

    def training_loss(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return and log the mean next-token loss of a batch."""
        loss = self.window_losses(batch["input_ids"]).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def calibration_forward(self, batch: dict[str, Tensor]) -> None:
        """Run the decoder on a batch of windows."""
        self.model(input_ids=batch["input_ids"], use_cache=False)

    def sample_positions(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the positions of the windows in the calibration set."""
        return batch["index"]

    def write_batch(self, batch: int, number: int, seq_len: int, seed: int) -> Tensor:
        """Sample a batch of windows of tokens from the model, to calibrate on.

        Args:
            batch: Number of the batch, from 0.
            number: Number of windows of all batches.
            seq_len: Number of tokens of a window.
            seed: Seed of all batches.

        Returns:
            Tokens, (windows of this batch, seq_len), int64, on the CPU.

        Raises:
            ValueError: If the model is not on one device, or names no token that begins a text, or there is no such batch.
        """
        return sample_batch(self.model, start_token(self.model, self.tokenizer), batch, number, seq_len, seed)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the losses of held-out windows."""
        self._add_losses("val", batch["input_ids"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the losses of windows of the test text."""
        self._add_losses("test", batch["input_ids"])

    def on_validation_epoch_start(self) -> None:
        """Reset the metric. Done here, since a later `fit` could not use a state that was made in inference mode."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Reset the metric."""
        self._reset("test")

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity of the held-out text."""
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """Log loss and perplexity of the test text."""
        self._log_perplexity("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[str]:
        """Return greedy continuations of the first half of each window."""
        prompts = batch["input_ids"][:, : batch["input_ids"].shape[1] // 2]
        mask = torch.ones_like(prompts)
        options = {"max_new_tokens": self.hparams.max_new_tokens, "do_sample": False}
        if self.hparams.static_cache:
            options["cache_implementation"] = "static"
        new = self.model.generate(input_ids=prompts, attention_mask=mask, **options)
        texts = self.tokenizer.batch_decode(new[:, prompts.shape[1] :], skip_special_tokens=True)
        starts, ends = self.tokenizer.batch_decode(prompts), self.tokenizer.batch_decode(prompts[:, -PROMPT_SHOWN:])
        for index, prompt, end, text in zip(batch["index"].tolist(), starts, ends, texts, strict=True):
            self._predictions.add(index=index, prompt=prompt, prompt_end=end, continuation=text)
        return texts

    def on_predict_epoch_end(self) -> None:
        """Write the continuations of all processes, and print the first few."""
        for row in self._predictions.write(self.trainer)[:PRINTED]:
            self.print(f"[{row['index']}] ...{row['prompt_end']} >>> {row['continuation']}")

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Return AdamW over parameters that are not frozen; None while pruning."""
        if self.calibration_step is not None:
            return None
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.hparams.learning_rate)

    def identity(self) -> dict[str, str]:
        """Return digests of the model and of the tokenizer, which is saved with the pruned model."""
        vocabulary = "" if self.tokenizer is None else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return super().identity() | {"tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()}

    def save(self, directory: Path) -> None:
        """Write Hugging Face's format: safetensors, config and tokenizer.

        Raises:
            ValueError: If linears are compressed.
        """
        if self._compresses:
            raise ValueError(
                f"Argument `compressed` = {self.hparams.compressed}: linears that were compressed in memory are not saved. The "
                "directory that this model was loaded from can be copied; or load it with `compressed` = none."
            )
        (self.model.save_pretrained if self.streamed is None else self.streamed.save)(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        copy_processor(self.model.config, self.path, directory)

    def _reset(self, split: str) -> None:
        self.metrics[split].reset()
        self.metrics[split].set_dtype(self.metric_dtype)  # a trainer with precision bf16-true has changed it
        if self.streamed is not None:
            _ = self.architecture  # which verifies blocks that were discovered
            shows = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
            self._passes = StreamedPasses(self.streamed, self.trainer.world_size // self.trainer.num_nodes, shows)

    def _add_losses(self, split: str, input_ids: Tensor) -> None:
        """Add the losses of windows; of a streamed model later, with other batches."""
        metric = self.metrics[split]
        if self._passes is None:
            metric.update(self.window_losses(input_ids))
        else:
            self._passes.add(lambda: self(input_ids), lambda logits: metric.update(_losses_of(logits, input_ids)))

    def _log_perplexity(self, split: str) -> None:
        if self._passes is not None:
            with self.trainer.precision_plugin.forward_context():
                self._passes.finish()
            self._passes = None
        loss = self.metrics[split].compute()
        perplexity = math.exp(min(loss.item(), LARGEST_LOSS))
        # A pruning run logs by block; the trainer's step would be the number of calibration batches.
        values = {f"{split}/loss": loss, f"{split}/perplexity": perplexity}
        self.log_dict(values, prog_bar=False, logger=self.calibration_step is None)


def _losses_of(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Return the mean next-token loss of each window, window by window, since float32 logits are large."""
    pairs = zip(logits, input_ids, strict=True)
    return torch.stack([nn.functional.cross_entropy(found[:-1].float(), ids[1:]) for found, ids in pairs])
