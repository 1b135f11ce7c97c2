"""What the tests of update rules share: tiny models with data, and attention by whole forward passes of the model."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from callbacks import BlockwisePruning
from datamodules import TextDataModule
from tests.helpers.recovery_runs import loaded
from tests.helpers.tiny import tiny_images, tiny_vit

SEQ_LEN, WINDOWS, RULE_WINDOWS = 24, 8, 3
MODELS = ("opt", "llama", "qwen3", "vit")


class Case:
    """A tiny model with its data, fit by the callback or walked through by hand."""

    def __init__(self, name, tiny_model, text_file, tmp_path):
        self.name, self.tmp_path = name, tmp_path
        if name == "vit":
            self.loaders = [DataLoader(tiny_images(count, seed), batch_size=3) for seed, count in enumerate((WINDOWS, 5))]
            self.data = None
        else:
            self.directory = tiny_model(name)
            sizes = {"seq_len": SEQ_LEN, "num_calibration": WINDOWS, "num_heldout": 4, "batch_size": 3}
            self.data = TextDataModule(self.directory, text_file, **sizes)

    def module(self):
        if self.name == "vit":
            return tiny_vit().eval()
        return loaded(self.directory).eval()

    def fit(self, module=None, logger=False, **arguments):
        module = module or self.module()
        callback = BlockwisePruning(**({"sparsity": 0.6} | arguments))
        trainer = Trainer(
            accelerator="cpu", default_root_dir=self.tmp_path, callbacks=[callback], logger=logger,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        if self.data is None:
            trainer.fit(module, *self.loaders)
        else:
            trainer.fit(module, self.data)
        return module, callback

    def samples(self):
        """Every calibration sample as a batch of one."""
        if self.data is None:
            return [torch.utils.data.default_collate([sample]) for sample in self.loaders[0].dataset]
        self.data.setup("fit")
        return [torch.utils.data.default_collate([sample]) for sample in self.data.train_dataloader().dataset]


def on_models(*names):
    return pytest.mark.parametrize("case", names or MODELS, indirect=True)


def attention_outputs(module, index, samples):
    """Output of the attention of one block on every sample, by whole forward passes of the model as it stands."""
    seen = []
    attention = module.attention(list(module.blocks.values())[index])
    hook = attention.register_forward_hook(lambda _, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for sample in samples:
            module.calibration_forward(sample)
    hook.remove()
    return torch.cat([x.double() for x in seen])


def attention_probabilities(module, index, samples):
    """Of language models, from transformers itself."""
    module.model.set_attn_implementation("eager")
    with torch.no_grad():
        result = [
            module.model(input_ids=sample["input_ids"], use_cache=False, output_attentions=True).attentions[index]
            for sample in samples
        ]
    module.model.set_attn_implementation("sdpa")
    return torch.cat(result).double()


def divergence_by_hand(module, other, index, samples):
    pruned, dense = (attention_probabilities(m, index, samples) for m in (module, other))
    return (pruned * (pruned.clamp_min(1e-300) / dense.clamp_min(1e-300)).log()).sum(-1).mean().item()
