"""Tables and plot of docs/performance.md and the README from the benchmarks' CSV files: none is typed.

python benchmarks/page.py
"""

import csv
import re
from pathlib import Path

from hf_ibnorm.base.files import write_text
from hf_ibnorm.report.plots import COLOURS, beside, figure
from hf_ibnorm.report.tables import Table

ROOT = Path(__file__).parent.parent
RESULTS, PAGES, PLOT = ROOT / "benchmarks/results", ("docs/performance.md", "README.md"), "docs/img/performance.png"
IN_README = ("torch layer_norm", "LlamaRMSNorm", "LlamaRMSNorm, torch.compile", "IBNorm-S, ours", "IBNorm-L, ours")
IN_README += ("IBNorm-T, ours", "NormalNorm, ours", "NormalNorm with noise, ours", "NormalNorm, published form")
SHAPES = (("4096", "1024"), ("2048", "512"))
IN_PLOT = {
    "IBNorm-S": ("ours",),
    "IBNorm-L": ("ours", "formulas", "formulas, torch.compile"),
    "IBNorm-T": ("ours",),
    "NormalNorm": ("ours", "published form", "published form, torch.compile"),
    "NormalNorm with noise": ("ours",),
    "LlamaRMSNorm": ("", "torch.compile"),
}
"""Norms, each in a colour, and who computes them, in a line style."""
Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """A CSV file's rows."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read(name: str) -> list[Row]:
    """The rows of a result."""
    return read_rows(RESULTS / f"{name}.csv")


def machine(rows: list[Row]) -> str:
    """The machine and versions of a result file, in a line."""
    row = rows[0]
    where = row.get("device") or f"{row['cores']} cores of an {row['cpu']}"
    return f"{where}, torch {row['torch']}, Transformers {row['transformers']}, {row['date']}"


def measured_on(rows: list[Row]) -> str:
    """The same of rounds in turns."""
    rounds = " and ".join(dict.fromkeys(each.get("rounds") or each["repeats"] for each in rows))
    return f"{machine(rows)}, medians of {rounds} interleaved rounds"


def filled(text: str, tables: dict[str, str]) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end -->` replaced by the table of that name."""
    for name, table in tables.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: m[1] + t + m[2], text, flags=re.S)  # type: ignore[misc]
    return text


def fill(page: Path, tables: dict[str, str]) -> None:
    """The same of a file."""
    write_text(page, filled(page.read_text(encoding="utf-8"), tables))


def norms_table(rows: list[Row]) -> str:
    """Every candidate at both shapes: milliseconds and ratios."""
    columns = ["norm"]
    for height, width in SHAPES:
        columns += [f"{height}×{width}: forward, ms", "backward, ms", "both ÷ layer_norm", "GB/s", "peak extra, MB"]
    table = Table(columns)
    for norm in dict.fromkeys(row["norm"] for row in rows if row["direction"] == "both"):
        cells = [f"**{norm}**" if norm.endswith("ours") else norm]
        for shape in SHAPES:
            by = {r["direction"]: r for r in rows if r["norm"] == norm and (r["rows"], r["width"]) == shape}
            both = by["both"]
            cells += [f"{float(by[each]['ms']):.2f}" for each in ("forward", "backward")]
            cells += [both["ratio_to_layer_norm"], both["gigabytes_per_second"], both["peak_extra_mb"]]
        table.rows.append(cells)
    return table.markdown()


def steps_table(rows: list[Row]) -> str:
    """Every norm in both Llamas: seconds of a step and its ratio to the stock model's."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    table = Table(["norm", *(cell for model in models for cell in (f"{model}: s a step", "÷ stock (least–most)"))])
    for norm in dict.fromkeys(row["norm"] for row in rows):
        cells = [norm]
        for model in models:
            row = next(r for r in rows if (r["model"], r["norm"]) == (model, norm))
            cells += [row["seconds"], _spread(row, "ratio_to_stock")]
        table.rows.append(cells)
    return table.markdown()


def speed_table(rows: list[Row]) -> str:
    """The README's few rows: forward and backward at the wider shape."""
    shown = {r["norm"]: r for r in rows if r["direction"] == "both" and (r["rows"], r["width"]) == SHAPES[0]}
    table = Table(["forward + backward, 4096×1024, float32", "ms", "÷ torch layer_norm"])
    table.rows = [[norm, f"{float(shown[norm]['ms']):.1f}", shown[norm]["ratio_to_layer_norm"]] for norm in IN_README]
    return table.markdown()


def _spread(row: Row, middle: str) -> str:
    return f"{row[middle]} ({row['ratio_least']}–{row['ratio_most']})"


def convert_table(rows: list[Row]) -> str:
    """Copies and conversions: seconds, and memory beside its bound."""
    table = Table(["", "s", "GB/s", "÷ flushed copy (least–most)", "peak memory, MB", "bound, MB"])
    for row in rows:
        name = row["kind"] if row["kind"].startswith("copy") else f"`--init {row['kind']}`"
        times = [row["seconds"], row["gigabytes_per_second"], _spread(row, "ratio_to_flushed_copy")]
        table.rows.append([name, *times, row["peak_mb"], row["bound_mb"]])
    return table.markdown()


def analysis_table(rows: list[Row]) -> str:
    """Analyses: seconds and memory by the length of the text."""
    table = Table(["", "tokens", "s", "peak memory, MB"])
    table.rows = [[row["what"], f"{int(row['tokens']):,}", row["seconds"], row["peak_mb"]] for row in rows]
    return table.markdown()


def watching_table(rows: list[Row]) -> str:
    """What --watch_norms costs, by norm."""
    table = Table(["norm", "plain step, s", "watched step ÷ plain", "`--watch_norms 50` (least–most)"])
    for row in rows:
        cost, *ends = (f"{float(row[key]):.1%}" for key in ("overhead_at_50", "overhead_least", "overhead_most"))
        cells = [f"{float(row['plain_seconds']):.3f}", f"{float(row['watched_to_plain']):.2f}"]
        table.rows.append([row["norm"], *cells, f"+{cost} ({'–'.join(ends)})"])
    return table.markdown()


def imports_table(rows: list[Row]) -> str:
    """Commands and imports: seconds, and multiples of what they are measured beside."""
    table = Table(["whole process", "s", "÷ `import torch`", "÷ Transformers' configs"])
    for row in rows:
        name = row["what"] if " import " in f" {row['what']}" else f"python -m {row['what']}"
        table.rows.append([f"`{name}`", row["seconds"], row["times_torch"], row["times_configs"]])
    return table.markdown()


def long_text_table(rows: list[Row]) -> str:
    """Texts of one line: memory by size."""
    table = Table(["one line of", "MB", "tokens", "peak memory, MB", "bytes a byte"])
    table.rows = [
        [f"`.{row['kind']}`", row["megabytes"], f"{int(row['tokens']):,}", row["peak_mb"], row["bytes_a_byte"]]
        for row in rows
    ]
    return table.markdown()


def tables() -> dict[str, str]:
    """What the pages show of the results."""
    shown = {
        "norms": ("fused_norms", measured_on, norms_table),
        "steps": ("fused_steps", measured_on, steps_table),
        "convert": ("convert", measured_on, convert_table),
        "analysis": ("analysis", machine, analysis_table),
        "watching": ("watching", measured_on, watching_table),
        "imports": ("imports", measured_on, imports_table),
        "long_text": ("long_text", machine, long_text_table),
    }
    made = {name: f"{where(read(file))}:\n\n{table(read(file))}" for name, (file, where, table) in shown.items()}
    return {**made, "speed": speed_table(read("fused_norms"))}


def plot(rows: list[Row], path: Path) -> None:
    """Forward and backward of ours and some peers as a multiple of torch's layer_norm, by width."""
    both = [row for row in rows if row["direction"] == "both"]
    widths = list(dict.fromkeys(int(row["width"]) for row in both))
    with figure(path, height=4.2) as axes:
        last = {}
        for (norm, forms), colour in zip(IN_PLOT.items(), COLOURS, strict=False):
            for form in forms:
                name = f"{norm}, {form}" if form else norm
                ratios = [float(row["ratio_to_layer_norm"]) for row in both if row["norm"] == name]
                style, mark = ("-", "o") if form == "ours" else (":", "^") if "compile" in form else ("--", "s")
                (line,) = axes.plot(widths, ratios, linestyle=style, marker=mark, color=colour, markersize=4)
                last[name] = ratios[-1], line
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel="forward + backward ÷ torch layer_norm")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        most = axes.get_ylim()[1]
        shown = [ratio for ratio in (1, 2, 5, 10, 20, 50, 100) if ratio <= most]
        axes.set_yticks(shown, [str(ratio) for ratio in shown])
        # In the order in which the curves end.
        beside(axes, {name: line for name, (_, line) in sorted(last.items(), key=lambda item: -item[1][0])})


def main() -> None:
    made = tables()
    for name in PAGES:
        fill(ROOT / name, made)
    plot(read("fused_norms"), ROOT / PLOT)
    print(*(table for name, table in made.items() if name != "speed"), sep="\n")


if __name__ == "__main__":
    main()
