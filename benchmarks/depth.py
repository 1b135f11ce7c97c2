"""Error of each block's output against the dense model, over depth -> results/depth.csv and results/depth.png.

    python -m benchmarks.depth --wikitext ../shared/data/wikitext-2
    python -m benchmarks.depth --draw                      only the figure, from the rows that are there

Each variant prunes the same model with the same calibration text. Then dense and pruned model read held-out windows; a row has
the mean over their tokens of ‖h − h_d‖² / ‖h_d‖², with h and h_d the outputs of a block in the pruned and the dense model.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.allocation import quiet_trainer
from benchmarks.joint import ABLATION, prune, text_data
from benchmarks.markdown import read
from benchmarks.quality import ENVIRONMENT, SMOLLM2, append, environment, finished, plain_wikitext
from lightning_modules import CausalLM

SHOWN = {
    "published update": "published update (d2_sparsegpt)",
    "joint solver alone": "mask and weights together",
    "all but the hidden states in the target": "+ stages and what inputs lack",
    "all": "+ what hidden states lack (solver: joint)",
}
KEYS = ("model", "dtype", "variant", "target", "calibration", "seq_len", "samples", "heldout", "seed", "block")
COLUMNS = (*KEYS, "error", *ENVIRONMENT)


@torch.no_grad()
def outputs_of(module: CausalLM, windows: Tensor) -> list[Tensor]:
    """Return the output of every block, (windows · tokens, features), float32, on the CPU.

    Args:
        module: The model.
        windows: Token ids, (windows, tokens).
    """
    found: list[list[Tensor]] = [[] for _ in module.blocks]

    def keep(index: int, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[index].append(hidden.flatten(0, -2).float().cpu())

    handles = [
        block.register_forward_hook(lambda _, args, output, index=index: keep(index, output))
        for index, block in enumerate(module.blocks.values())
    ]
    try:
        for window in windows:
            module.model(input_ids=window[None].to(module.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in found]


def relative_error(hidden: Tensor, dense: Tensor) -> float:
    """Return the mean over tokens of ‖h − h_d‖² / ‖h_d‖²."""
    return ((hidden - dense).square().sum(-1) / dense.square().sum(-1)).mean().item()


def measure(args: argparse.Namespace, scratch: Path) -> None:
    """Run the variants that are missing."""
    paths, done, facts = plain_wikitext(args.wikitext, scratch), finished(args.output, KEYS), environment()
    fixed = {"model": Path(args.model).stem, "dtype": args.dtype, "calibration": "wikitext2-valid", "seq_len": args.seq_len}
    fixed |= {"samples": args.samples, "heldout": args.heldout, "seed": args.seeds[0], "target": args.target}
    seed_everything(args.seeds[0], verbose=False)
    module = CausalLM(args.model, dtype=args.dtype)
    module.configure_model()
    if torch.cuda.is_available():
        module.model.cuda()
    weights = {key: value.clone() for key, value in module.model.state_dict().items()}
    data = text_data(args, paths, "wikitext2-valid", args.seeds[0])
    quiet_trainer(scratch).validate(module, data, verbose=False)  # makes the windows
    windows = torch.cat([batch["input_ids"].cpu() for batch in data.val_dataloader()])
    dense = outputs_of(module, windows)
    for variant in SHOWN:
        row = fixed | {"variant": variant}
        if tuple(str((row | {"block": 0})[key]) for key in KEYS) in done:
            continue
        seed_everything(args.seeds[0], verbose=False)
        prune(module, data, weights, row | {"study": "depth"}, ABLATION[variant], scratch)
        if torch.cuda.is_available():
            module.model.cuda()
        for block, pair in enumerate(zip(outputs_of(module, windows), dense, strict=True)):
            append(args.output, row | {"block": block, "error": round(relative_error(*pair), 6)} | facts, COLUMNS)
        print(variant, row, flush=True)


def draw(rows: list[dict[str, str]]) -> Figure:
    """Draw the error over depth, a line for each variant."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained", dpi=110)
    axis = figure.subplots()
    for variant, label in SHOWN.items():
        points = [(int(row["block"]) + 1, float(row["error"])) for row in rows if row["variant"] == variant]
        if points:
            axis.plot(*zip(*sorted(points), strict=True), label=label, marker="o", markersize=3)
    first = rows[0]
    axis.set_xlabel(f"block of {first['model'].split('.')[0]}")
    axis.set_ylabel("relative error of the hidden states")
    axis.set_title(f"{100 * float(first['target']):g} % zeros, against the dense model, held-out text", fontsize=10)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def main() -> None:
    """Measure what is missing and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, help="folder with wiki.test.raw and wiki.valid.tokens")
    parser.add_argument("--draw", action="store_true", help="draw the figure of the rows that are there")
    parser.add_argument("--output", type=Path, default=Path("results/depth.csv"))
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--target", default="0.7")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--heldout", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs=1, default=[0])
    args = parser.parse_args()
    if not args.draw:
        if args.wikitext is None:
            parser.error("give --wikitext, or --draw")
        with tempfile.TemporaryDirectory() as folder:
            measure(args, Path(folder))
    draw(read(str(args.output.resolve()))).savefig(args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
