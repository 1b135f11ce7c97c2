"""Tables on time: prune_speed, multi_gpu, csg2l_scaling, sparse24, sparse_decode, sparse_cpu, smaller_faster, streaming.csv."""

from statistics import median

from benchmarks.markdown import read, table

JOINT_PARTS = {
    "joint, one pass, pruned model's target": "the joint solver alone",
    "joint, pruned model's target": "with stages",
    "joint, one pass": "with a target",
    "joint": "with both",
    "joint, 2:4": "with both, 2:4",
}
"""Variant -> its name in the table of what each part costs."""
MOST_OF_DECODING = 32
"""Tokens of a product up to which no form makes the dense matrix."""
LINEARS = {"unstructured": "lanes", "2:4 and rest": "2:4 and rest"}
"""Form of linears with zeros anywhere -> what the table says."""
COMPILED = {"whole": "compiled", "none": "eager"}
"""How a model of sparse_decode.csv ran -> what the table says."""
PHASES = ("two_passes", "statistics", "solve", "rule", "block")


def prune_speed() -> str:
    """Return milliseconds of a block by phase, and the factor of the plain variant; a table for each device."""
    rows = read("prune_speed.csv")
    return "\n\n".join(on_device([row for row in rows if row["hardware"] == name]) for name in hardware(rows))


def hardware(rows: list[dict[str, str]]) -> list[str]:
    """Return the devices in the order in which they come."""
    return list(dict.fromkeys(row["hardware"] for row in rows))


def on_device(rows: list[dict[str, str]]) -> str:
    """Return the table of one device."""
    plain = {(r["model"], r["variant"].partition(" ")[2].split(",")[0]): float(r["block"]) for r in rows if is_plain(r)}
    lines = []
    for row in rows:
        times = {name: float(row[name]) for name in PHASES if row[name]}
        if is_plain(row):
            times["statistics"] += float(row["propagation"])  # ours has both in one pass over the batches
        base = None if is_plain(row) else plain.get((row["model"], row["variant"].split(",")[0]))
        cells = [f"{1000 * times[name]:.0f}" if name in times else "" for name in PHASES]
        cells += [f"{base / times['block']:.1f}" if base else "", f"{float(row['whole_run']):.1f}" if row["whole_run"] else ""]
        cells.append(f"{float(row['peak_memory_gib']):.1f}" if row["peak_memory_gib"] else "")
        cells.append(f"{float(row['test_perplexity']):.2f}" if row["test_perplexity"] else "")
        cells.append(f"{float(row['same_mask']):.3f}" if row["variant"].endswith(", high") else "")
        lines.append([f"{row['model']}, {row['variant']}, {row['blocks']} blocks, {row['dtype']}", *cells])
    first = rows[0]
    sizes = dict.fromkeys(f"{row['dtype']}, {row['samples']} x {row['seq_len']} tokens" for row in rows)
    sizes = f"{'; '.join(sizes)}; {first['threads']} threads"
    versions = f"torch {first['torch']}, transformers {first['transformers']}, lightning {first['lightning']}"
    header = [
        "ms, median",
        "two passes",
        "statistics, propagation",
        "solve",
        "rule",
        "block",
        "plain / ours",
        "run, s",
        "peak GiB",
        "test perplexity",
        "same mask",
    ]
    return f"{table(header, lines)}\n\n{first['hardware']}, {sizes}, {versions}, seed {first['seed']}."


def joint_cost() -> str:
    """Return milliseconds of a block with the joint solver alone, with each of its parts, and with all."""
    rows = [row for row in read("prune_speed.csv") if row["model"] == "llama-2-7b" and row["variant"].startswith("joint")]
    found = {row["variant"]: row for row in rows}
    lines = [
        [name, *(f"{1000 * float(found[variant][column]):.0f}" for column in ("two_passes", "statistics", "solve", "block"))]
        for variant, name in JOINT_PARTS.items()
    ]
    return table(["", "two passes", "statistics, propagation", "solve", "block"], lines)


def is_plain(row: dict[str, str]) -> bool:
    """Whether a row is the plain variant's."""
    return row["variant"].startswith("plain")


def multi_gpu() -> str:
    """Every quantity, a column for each number of devices."""
    rows = read("multi_gpu.csv")
    devices = sorted({row["devices"] for row in rows}, key=int)
    found = {(row["part"], row["model"], row["quantity"], row["devices"]): row for row in rows}
    lines = []
    for part, model, quantity in dict.fromkeys((row["part"], row["model"], row["quantity"]) for row in rows):
        cells = [found.get((part, model, quantity, number)) for number in devices]
        unit = next(cell["unit"] for cell in cells if cell)
        name = f"{part}: {model}, {quantity.replace('_', ' ')}" + (f" ({unit})" if unit else "")
        lines.append([name, *(_shown(cell["value"]) if cell else "" for cell in cells)])
    first = rows[0]
    note = f"{first['hardware']}, torch {first['torch']}, transformers {first['transformers']}, lightning {first['lightning']}."
    return f"{table(['', *(f'{number} GPU' for number in devices)], lines)}\n\n{note}"


def _shown(value: str) -> str:
    """Five digits, or a word."""
    try:
        return f"{float(value):.5g}"
    except ValueError:
        return value


def graph_scaling() -> str:
    """Seconds and memory by number of nodes."""
    rows = read("csg2l_scaling.csv")
    lines = [[row["what"], *(f"{int(row[name]):,}" if row[name] else "" for name in ("nodes", "edges", "anchors")),
              row["seconds"], row["more_peak_gib"]] for row in rows]  # fmt: skip
    first = rows[0]
    other = sorted({row["what"] for row in rows if row["threads"] != first["threads"]})
    fewer = f" ({' and '.join(other)}: one, on a machine that other work shared)" * bool(other)
    note = (
        f"{first['hardware']}, {first['threads']} threads{fewer}, rank {first['rank']}, torch {first['torch']}, "
        f"seed {first['seed']}."
    )
    return f"{table(['', 'nodes', 'edges', 'anchors', 's', 'GiB more'], lines)}\n\n{note}"


def sparse24() -> str:
    """Compressed 2:4 linears beside dense ones: one at a time, and the whole model."""
    rows = read("sparse24.csv")
    linears = [
        [
            f"{row['what']}, {row['outputs']} x {row['inputs']}, tokens: {row['tokens']}",
            *(f"{float(row[name]):.1f}" for name in ("dense", "compressed")),
            f"{float(row['speedup']):.2f}",
            f"{float(row['compressed_gb_s']):.0f}" if row["compressed_gb_s"] else "",
            *(f"{float(row[name]):.5f}" for name in ("dense_error", "error")),
        ]
        for row in rows
        if row["part"] == "linears"
    ]
    model = [
        [
            f"{row['what']} ({row['unit']})" + (f", batch {row['batch']}" if row["batch"] else ""),
            *(f"{float(row[name]):.4g}" if row[name] else "" for name in ("dense", "compressed")),
            f"{float(row['speedup']):.2f}" if row["speedup"] else "",
        ]
        for row in rows
        if row["part"] == "model"
    ]
    header = ["µs", "dense", "2:4", "dense / 2:4", "2:4, GB/s", "relative error, dense", "2:4"]
    tables = [table(header, linears)] + [table(["", "dense", "2:4", "2:4 / dense"], model)] * bool(model)
    first = rows[0]
    note = f"{first['hardware']}, {first['dtype']}, torch {first['torch']}, transformers {first['transformers']}, seed 0."
    return "\n\n".join([*tables, note])


def sparse_decode() -> str:
    """How many times as fast as dense linears with zeros are on a GPU, by number of tokens; prompts; and the whole model."""
    rows = [row for row in read("sparse_decode.csv") if row["part"] == "linears"]
    few = speedups([row for row in rows if int(row["tokens"]) <= MOST_OF_DECODING])
    many = speedups([row for row in rows if int(row["tokens"]) > MOST_OF_DECODING])
    return f"{few}\n\nPrompts, which make the dense matrix for each product:\n\n{many}\n\n{sparse_model()}"


def speedups(linears: list[dict[str, str]]) -> str:
    """Dense times and speedups of linears, a line for each form, a column for each number of tokens."""
    tokens = sorted({row["tokens"] for row in linears}, key=int)
    found = {(row["what"], row["form"], row["zeros"], row["tokens"]): row for row in linears}
    lines = []
    for what in dict.fromkeys(row["what"] for row in linears):
        here = [row for row in linears if row["what"] == what]
        dense = {row["tokens"]: float(row["dense_us"]) for row in here}
        size = f"{here[0]['outputs']} x {here[0]['inputs']}"
        lines.append([f"{what}, {size}: dense, µs", "1", *(f"{dense[count]:.1f}" for count in tokens)])
        for form, zeros in dict.fromkeys((row["form"], row["zeros"]) for row in here):
            cells = [found.get((what, form, zeros, count)) for count in tokens]
            name = form if form == "2:4" else f"{float(zeros):.0%} zeros, {LINEARS[form]}"
            share = next(f"{float(cell['bytes_share']):.2f}" for cell in cells if cell)
            lines.append([f"{what}, {name}", share, *(f"{float(cell['speedup']):.2f}" if cell else "" for cell in cells)])
    return table(["dense / form", "bytes", *(f"tokens: {count}" for count in tokens)], lines)


def sparse_model() -> str:
    """Tokens a second of a whole model by the form of its linears, and their bytes."""
    rows = [row for row in read("sparse_decode.csv") if row["part"] == "model"]
    lines = [
        [", ".join([row["form"], COMPILED[row["compiled"]], *row["what"].split(", ")[1:]]), row["tokens"],
         f"{float(row['tokens_s']):.0f}", f"{float(row['gib']):.2f}"] for row in rows
    ]  # fmt: skip
    first = rows[0]
    note = (
        f"After {first['prompt']} tokens, random weights, seed {first['seed']}; {first['hardware']}, "
        f"{first['dtype']}, torch {first['torch']}, transformers {first['transformers']}."
    )
    return f"{table(['whole model', 'sequences', 'tokens/s', 'linears, GiB'], lines)}\n\n{note}"


def sparse_cpu() -> str:
    """Times of a dense float32 linear on a CPU, and how many times as fast sparse rows are, by share of zeros."""
    rows = [row for row in read("sparse_cpu.csv") if row["dtype"] == "float32"]
    first, shares = rows[0], sorted({row["zeros"] for row in rows})
    lines = []
    for what, tokens in dict.fromkeys((row["what"], row["tokens"]) for row in rows):
        found = {row["zeros"]: row for row in rows if (row["what"], row["tokens"]) == (what, tokens)}
        dense = [median(float(row[f"{form}_us"]) for row in found.values()) for form in ("dense", "packed")]
        speedups = [f"{float(found[share]['speedup']):.2f}" if share in found else "" for share in shares]
        size = next(f"{row['outputs']} x {row['inputs']}" for row in found.values())
        lines.append([f"{what}, {size}, tokens: {tokens}", *(f"{value:,.0f}" for value in dense), *speedups])
    header = ["", "dense, µs", "packed, µs", *(f"dense / sparse rows, {float(share):.0%}" for share in shares)]
    threads = f"{first['threads']} thread{'s'[: first['threads'] != '1']}"
    return f"{table(header, lines)}\n\n{first['hardware']}, {threads}, float32, torch {first['torch']}, seed {first['seed']}."


def smaller_faster() -> str:
    """Bytes, tokens a second and perplexity of a pruned model by form; four columns for each device."""
    rows = read("smaller_faster.csv")
    setups = list(dict.fromkeys((row["device"], row["dtype"], row["static_cache"]) for row in rows))
    found = {(row["target"], row["form"], row["device"], row["dtype"], row["static_cache"]): row for row in rows}
    lines = []
    for target, form in dict.fromkeys((row["target"], row["form"]) for row in rows):
        zeros = target if ":" in target else "" if target == "dense" else f"{100 * float(target):g} % zeros"
        cells = [text for setup in setups for text in _how_good(found.get((target, form, *setup)))]
        lines.append([f"{zeros}, {form}" if zeros else target, *cells])
    names = ("files, MB", "memory, MB", "tokens/s", "perplexity")
    header = ["", *(f"{device}, {dtype}: {name}" if len(setups) > 1 else name for device, dtype, _ in setups for name in names)]
    notes = [next(row for row in rows if (row["device"], row["dtype"], row["static_cache"]) == setup) for setup in setups]
    return f"{table(header, lines)}\n\n{' '.join(_setup(row) for row in notes)}"


def _how_good(row: dict[str, str] | None) -> list[str]:
    """Return the cells of a form on a device."""
    if row is None:
        return [""] * 4
    sizes = [f"{float(row[name]) / 1e6:.0f}" for name in ("disk_bytes", "memory_bytes")]
    return [*sizes, f"{float(row['tokens_s']):.1f}", f"{float(row['perplexity']):.2f}"]


def _setup(row: dict[str, str]) -> str:
    """Return how the columns of a device were measured."""
    steps = "steps compiled with a static cache" if row["static_cache"] == "True" else "no graphs"
    return (
        f"{row['hardware']}, {row['dtype']}, {row['prompt']} + {row['steps']} tokens, batch 1, "
        f"{steps}; {row['samples']} x {row['seq_len']} calibration and {row['windows']} x {row['seq_len']} test tokens; torch "
        f"{row['torch']}, transformers {row['transformers']}, seed {row['seed']}."
    )


def streaming() -> str:
    """Return memory and time of streamed runs, and of runs in memory beside them."""
    rows, lines = read("streaming.csv"), []
    for row in rows:
        name = f"{row['shape']}, {row['blocks']} blocks, {row['dtype']}, {row['method']}, {row['samples']} x {row['seq_len']}"
        numbers = ("checkpoint_gib", "limit_gib", "peak_rss_gib", "in_memory_peak_rss_gib", "seconds", "in_memory_seconds")
        cells = [f"{float(row[number]):.{0 if 'seconds' in number else 2}f}" if row[number] else "" for number in numbers]
        where = f"{row['hardware']}, {row['threads']} thread{'s'[: row['threads'] != '1']}, torch {row['torch']}"
        lines.append([name, *cells, {"True": "yes", "False": "no", "": ""}[row["same_weights"]], where])
    header = ["", "checkpoint, GiB", "limit", "peak", "peak, in memory", "s", "s, in memory", "same bits", "measured on"]
    return f"{table(header, lines)}\n\nHost memory; lightning {rows[0]['lightning']}, seed 0."


TABLES = {"prune-speed": prune_speed, "joint-cost": joint_cost, "multi-gpu": multi_gpu, "graphs-scaling": graph_scaling}
TABLES |= {
    "sparse24": sparse24,
    "sparse-decode": sparse_decode,
    "sparse-cpu": sparse_cpu,
    "smaller-faster": smaller_faster,
    "streaming": streaming,
}
