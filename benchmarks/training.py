"""Speed of train_lm beside its peers: fresh processes, interleaved, on the same model, batches and data.

python benchmarks/training.py trainer     # tokens/s beside Transformers' Trainer, demo Llama with RMSNorm
python benchmarks/training.py loop        # tokens/s beside a minimal loop by hand, GPT-2-small shape, short context
python benchmarks/training.py start       # seconds from the command to the first step, tokens cached
python benchmarks/training.py checkpoint  # seconds that a checkpoint of a 58M model keeps training waiting

Each takes [--repeats N] [--output FILE.csv].
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results_file import report

SHAPES = {
    "trainer": ["--config", "demo", "--model.norm_type", "rmsnorm", "--max_steps", "30", "--warmup_steps", "2"],
    "loop": [
        *("--config", "demo", "--model.model_type", "gpt2", "--model.norm_type", "layernorm", "--max_steps", "14"),
        *("--model.vocab_size", "50304", "--model.hidden_size", "768", "--model.intermediate_size", "3072"),
        *("--model.num_hidden_layers", "12", "--model.num_attention_heads", "12", "--block_size", "64"),
        *("--per_device_train_batch_size", "8", "--warmup_steps", "2", "--learning_rate", "6e-4"),
    ],
    "start": ["--config", "demo", "--max_steps", "40"],
    "checkpoint": [
        *("--config", "demo", "--model.norm_type", "rmsnorm", "--max_steps", "16", "--checkpoint_every", "6"),
        *("--model.vocab_size", "32000", "--model.hidden_size", "512", "--model.intermediate_size", "1376"),
        *("--model.num_hidden_layers", "8", "--model.num_attention_heads", "8", "--block_size", "256"),
        *("--model.tie_word_embeddings", "false", "--per_device_train_batch_size", "2", "--warmup_steps", "2"),
    ],
}
SKIPPED = 4
"""First steps, which allocate memory and warm caches up."""


def flags_of(shape: str, run_dir: Path) -> list[str]:
    return [*SHAPES[shape], "--run_dir", str(run_dir), "--max_eval_blocks", "1", "--eval_every", "1000"]


def ours(shape: str, folder: Path) -> list[float]:
    """Moments at which steps of train_lm end, its logging and TensorBoard's included."""
    from accelerate import Accelerator

    from train_lm.config import read_command_line
    from train_lm.train import train

    ends, log = [], Accelerator.log

    def noting(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        log(self, *args, **kwargs)
        ends.append(time.perf_counter())

    Accelerator.log = noting  # type: ignore[method-assign]
    train(read_command_line([*flags_of(shape, folder / "run"), "--checkpoint_every", "0"]))
    return ends


def material(shape: str, folder: Path) -> tuple[Any, Any]:
    """What train_lm would train and on what, made by its own functions."""
    from accelerate import Accelerator

    from train_lm.config import read_command_line
    from train_lm.start import Start
    from train_lm.state import set_up

    config = read_command_line(flags_of(shape, folder / "run"))
    run = set_up(config, Accelerator(cpu=True), Start(None, None, False, []), print)
    return config, run


def trainer(shape: str, folder: Path) -> list[float]:
    """Moments at which steps of Transformers' Trainer end, on the same batches, with its defaults."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config, run = material(shape, folder)
    ends: list[float] = []

    class Noting(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    blocks = []
    for _ in range(config.max_steps):
        for inputs, _ in run.task.batches.next().parts:
            blocks += [{"input_ids": row, "labels": row} for row in inputs]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.per_device_train_batch_size,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine",
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(run.model, arguments, train_dataset=blocks, callbacks=[Noting()]).train()
    return ends


def loop(shape: str, folder: Path) -> list[float]:
    """Moments at which steps of a minimal loop end: one batch, one loss read back, clipping, fused AdamW."""
    import torch
    import torch.nn.functional as F

    config, run = material(shape, folder)
    batches = [run.task.batches.next().parts[0] for _ in range(config.max_steps)]
    model = run.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    ends = []
    for step, (inputs, targets) in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, step / 2)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(time.perf_counter())
    return ends


def child(kind: str, shape: str) -> None:
    """Train as `kind` and print the seconds of each step after the first ones."""
    from hf_ibnorm.base.command import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        ends = {"ours": ours, "trainer": trainer, "loop": loop}[kind](shape, Path(folder))
    print(json.dumps([b - a for a, b in zip(ends[SKIPPED:], ends[SKIPPED + 1 :], strict=False)]))


def in_a_process(*words: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def beside(peer: str, repeats: int) -> dict[str, Any]:
    """Tokens per second of train_lm and of `peer`, from the median step of each pair of processes."""
    shape = SHAPES[peer]
    size = int(shape[shape.index("--block_size") + 1]) if "--block_size" in shape else 256
    batch = (
        16
        if "--per_device_train_batch_size" not in shape
        else int(shape[shape.index("--per_device_train_batch_size") + 1])
    )
    speeds: dict[str, list[float]] = {"ours": [], peer: []}
    for i in range(repeats):
        for kind in sorted(speeds, reverse=bool(i % 2)):
            speeds[kind].append(size * batch / statistics.median(in_a_process("child", kind, peer)))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds[peer], strict=True)]
    return {
        "tokens_per_second": f"{statistics.median(speeds['ours']):.0f}",
        "peer_tokens_per_second": f"{statistics.median(speeds[peer]):.0f}",
        "ratio": f"{statistics.median(ratios):.3f}",
        "ratio_least": f"{min(ratios):.3f}",
        "ratio_most": f"{max(ratios):.3f}",
    }


def start(repeats: int) -> dict[str, Any]:
    """Seconds from the command to the first line of metrics.jsonl; the first time also makes the cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_IBNORM_CACHE": f"{folder}/cache"}
        for i in range(repeats + 1):
            run_dir = Path(folder) / f"run-{i}"
            began = time.perf_counter()
            command = [sys.executable, "-m", "train_lm", *flags_of("start", run_dir)]
            training = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            path = run_dir / "metrics.jsonl"
            while not (path.exists() and path.stat().st_size) and training.poll() is None:
                time.sleep(0.005)
            seconds.append(time.perf_counter() - began)
            training.terminate()
            training.wait()
    cold, *warm = seconds
    median, most = statistics.median(warm), max(warm)
    return {"first_step_seconds": f"{median:.2f}", "most": f"{most:.2f}", "with_an_empty_cache": f"{cold:.2f}"}


def pauses() -> None:
    """Print what checkpoints of the 58M model cost training, and their size."""
    from hf_ibnorm.base.command import quiet_libraries
    from train_lm.checkpoint import Checkpointer
    from train_lm.config import read_command_line
    from train_lm.state import State
    from train_lm.train import train

    quiet_libraries()
    waits: list[float] = []
    writes: list[float] = []
    sizes: list[int] = []

    def timed(cls: type, name: str, into: list[float]) -> None:
        original = getattr(cls, name)

        def wrapped(self: Any, *args: Any) -> Any:
            began = time.perf_counter()
            result = original(self, *args)
            into.append(time.perf_counter() - began)
            if name == "snapshot":
                sizes.append(sum(each.nbytes for each in [*result.model.parameters(), *result.tensors.values()]))
            return result

        setattr(cls, name, wrapped)

    copies: list[float] = []
    timed(State, "snapshot", copies)
    timed(Checkpointer, "write", waits)
    timed(Checkpointer, "_write", writes)
    with tempfile.TemporaryDirectory() as folder:
        train(read_command_line(flags_of("checkpoint", Path(folder) / "run")))
    # The first checkpoint is step 0, before training.
    print(
        json.dumps(
            {
                "pauses": [a + b for a, b in zip(copies, waits, strict=True)][1:],
                "writes": writes[1:],
                "bytes": sizes[-1],
            }
        )
    )


def checkpoint(repeats: int) -> dict[str, Any]:
    """Pause of training at a checkpoint, and how long it then takes to be on the disk."""
    found = [in_a_process("pauses") for _ in range(repeats)]
    paused = [each for one in found for each in one["pauses"]]
    written = [each for one in found for each in one["writes"]]
    return {
        "gigabytes": f"{found[0]['bytes'] / 1e9:.2f}",
        "pause_seconds": f"{statistics.median(paused):.2f}",
        "pause_most": f"{max(paused):.2f}",
        "write_seconds": f"{statistics.median(written):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("trainer", "loop", "start", "checkpoint"))
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file to write (default: none)")
    arguments = parser.parse_args()
    measured = {"start": start, "checkpoint": checkpoint}
    what, repeats = arguments.what, arguments.repeats
    figures = measured[what](repeats) if what in measured else beside(what, repeats)
    report(figures, ("torch", "transformers", "accelerate", "hf_ibnorm"), repeats, arguments.output)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["child", kind, shape]:
            child(kind, shape)
        case ["pauses"]:
            pauses()
        case _:
            main()
