"""Tables of results/README.md on time: prune_speed.csv, multi_gpu.csv."""

from benchmarks.markdown import read, table

PHASES = ("two_passes", "statistics", "solve", "rule", "block")


def prune_speed() -> str:
    """Milliseconds of a block by phase, and how many times the plain variant takes."""
    rows = read("prune_speed.csv")
    plain = {row["model"]: float(row["block"]) for row in rows if row["variant"] == "plain d2prune, v held"}
    plain_wanda = {row["model"]: float(row["block"]) for row in rows if row["variant"] == "plain wanda"}
    lines = []
    for row in rows:
        times = {name: float(row[name]) for name in PHASES if row[name]}
        if row["variant"].startswith("plain"):
            times["statistics"] += float(row["propagation"])  # ours has both in one pass over the batches
        base = (plain_wanda if "wanda" in row["variant"] else plain).get(row["model"])
        faster = f"{base / times['block']:.1f}" if base and not row["variant"].startswith("plain") else ""
        cells = [f"{1000 * times[name]:.0f}" if name in times else "" for name in PHASES]
        memory = f"{float(row['peak_memory_gib']):.1f}" if row["peak_memory_gib"] else ""
        lines.append([f"{row['model']}, {row['variant']}", *cells, faster, memory])
    first = rows[0]
    note = (
        f"Random weights, {first['dtype']}, {first['samples']} x {first['seq_len']} tokens, one {first['hardware']}, torch "
        f"{first['torch']}, transformers {first['transformers']}, lightning {first['lightning']}. Milliseconds, median."
    )
    header = ["", "two passes", "statistics and propagation", "solve", "rule", "block", "plain / ours", "peak GiB"]
    return f"{table(header, lines)}\n\n{note}"


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
        lines.append([name, *(f"{float(cell['value']):.5g}" if cell else "" for cell in cells)])
    first = rows[0]
    note = f"{first['hardware']}, torch {first['torch']}, transformers {first['transformers']}, lightning {first['lightning']}."
    return f"{table(['', *(f'{number} GPU' for number in devices)], lines)}\n\n{note}"


TABLES = {"prune-speed": prune_speed, "multi-gpu": multi_gpu}
