"""What swapping the norms of a pretrained Llama costs, and what calibration and healing win back: docs/convert.md.

    python benchmarks/conversion.py MODEL --work DIR

Each case is converted twice by `hf-ibnorm convert` (keep, calibrate), healed by `train_lm --config heal` from the
calibrated one, and measured by `hf-ibnorm convert_report`. A case whose report is there is left alone, so that the same
command goes on where it was stopped; `--page` alone writes the table of docs/convert.md and draws
the pictures from the reports.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from page import fill

from hf_ibnorm.convert.cost import SOURCE, draw_sites, mean_score
from hf_ibnorm.report.tables import Table

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs/convert.md", ROOT / "docs/results/convert"
# In units of each row's own mean magnitude, which differs from layer to layer and from token to token; rms is what a
# Llama's norms do.
IBNORM = {"unit": "mean_abs", "standardize": "rms"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ibnorm_l-0.05": ("ibnorm_l", {"lam": 0.05, **IBNORM}),
    "ibnorm_l-1": ("ibnorm_l", {"lam": 1.0, **IBNORM}),
    "ibnorm_t-0.05": ("ibnorm_t", {"lam": 0.05, **IBNORM}),
    "ibnorm_t-0.5": ("ibnorm_t", {"lam": 0.5, **IBNORM}),
    "layernormalnorm": ("layernormalnorm", {"noise": 0.0}),
}
STAGES = ("swapped", "calibrated", "healed")
STEPS, SEQUENCES, LENGTH = 20, 4, 256
CALIBRATION, TOKENS, SCORED = 8192, 8192, 50


def run(words: list[str]) -> None:
    """Run one of the house's commands; its output goes to the terminal."""
    print("+", " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def study(model: Path, case: str, work: Path, output: Path) -> None:
    """Convert, calibrate, heal and measure one case."""
    norm, options = CASES[case]
    folders = {"swapped": work / "swapped", "calibrated": work / "calibrated", "healed": work / "run/final"}
    for init, stage in (("keep", "swapped"), ("calibrate", "calibrated")):
        flags = ["--norm", norm, "--init", init, "--no_report", "--calibration_tokens", str(CALIBRATION)]
        flags += [word for name, value in options.items() for word in (f"--norm_kwargs.{name}", json.dumps(value))]
        run(["hf_ibnorm.cli", "convert", str(model), str(folders[stage]), *[word.strip('"') for word in flags]])
    flags = ["--config", "heal", "--model.init_from", str(folders["calibrated"]), "--run_dir", str(work / "run")]
    flags += ["--lam_schedule", "constant", "--lam_warmup_steps", "0", "--max_steps", str(STEPS), "--warmup_steps", "2"]
    flags += ["--teacher", str(model), "--distillation_weight", "1.0", "--block_size", str(LENGTH)]
    flags += ["--per_device_train_batch_size", str(SEQUENCES), "--max_eval_blocks", "8", "--eval_every", str(STEPS)]
    run(["train_lm", *flags, "--checkpoint_every", "0", "--log_with", "[]"])
    flags = [f"{stage}={folders[stage]}" for stage in STAGES]
    flags += ["--output", str(output), "--tokens", str(TOKENS), "--scores", str(SCORED)]
    run(["hf_ibnorm.cli", "convert_report", str(model), *flags])


def reports() -> dict[str, dict[str, Any]]:
    """Case → its report, for those that are there."""
    paths = {case: RESULTS / case / "report.json" for case in CASES}
    return {case: json.loads(path.read_text(encoding="utf-8")) for case, path in paths.items() if path.is_file()}


def table(by_case: dict[str, dict[str, Any]]) -> str:
    """A row for the source and for each stage of each case, and on what they were measured."""
    columns = ["bits per byte", "won back", "KL, nats", "same top token", "embedded, mean", "narrowest row"]
    shown = Table(["norm", "stage", *columns])
    first = next(iter(by_case.values()))
    source = first["stages"][SOURCE]
    shown.rows.append(["RMSNorm", SOURCE, *_cells(source, None, None)])
    for case, report in by_case.items():
        for name in STAGES:
            stage = report["stages"][name]
            swapped = report["stages"][STAGES[0]] if name != STAGES[0] else None
            link = f"[{stage['norm']}](results/convert/{case}/report.md)"
            shown.rows.append([link, name, *_cells(stage, source, swapped)])
    made = first["environment"]
    where = f"{made['cpu_count']} cores of an {made['device']}, torch {made['versions']['torch']}, {made['date'][:10]}"
    return f"{shown.markdown()}\n{first['tokens']:,} tokens of {first['text']}; {where}.\n"


def _cells(stage: dict[str, Any], source: dict[str, Any] | None, swapped: dict[str, Any] | None) -> list[str]:
    """The numbers of a stage; what it won back of what was lost by the swap, where that is given."""
    back = ""
    if source and swapped:
        lost = [each["bits_per_byte"] - source["bits_per_byte"] for each in (stage, swapped)]
        back = f"{1 - lost[0] / lost[1]:.0%}"
    least = min(site["least_row_std"] for site in stage["sites"].values())
    return [
        *(f"{stage['bits_per_byte']:.3f}", back, f"{stage['kl']:.3g}", f"{stage['top1']:.1%}"),
        *(f"{mean_score(stage['scores']):.1f}", f"{least:.2g}"),
    ]


def tables() -> dict[str, str]:
    """What the page shows of the reports that are there."""
    return {"conversions": table(reports())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="directory of the model, such as tests/smollm2.py makes")
    parser.add_argument("--work", type=Path, help="folder for the models, which are removed again")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    parser.add_argument("--page", action="store_true", help="only write the page and the pictures")
    arguments = parser.parse_args()
    if not arguments.page and (arguments.model is None or arguments.work is None):
        parser.error("MODEL and --work, or --page")
    for case in () if arguments.page else arguments.cases:
        if not (RESULTS / case).exists():
            work = arguments.work / case
            shutil.rmtree(work, ignore_errors=True)
            study(arguments.model, case, work, RESULTS / case)
            shutil.rmtree(work)
    for case, report in reports().items():
        draw_sites(report, RESULTS / case / "report.png")
    fill(PAGE, tables())


if __name__ == "__main__":
    main()
