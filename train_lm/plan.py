"""`python -m train_lm.plan RECIPE --gpus N --device h100`: what a run would take, before a GPU is rented.

Memory is counted by running a step of the real model without values (`memory.py`), and divided as each way of spreading
the model divides it; time is a roofline. The constants are assumptions, and the output repeats them. Nothing is
trained.
"""

import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_ibnorm.base.command import OneLineParser, quiet_libraries, require_extra, run_command
from hf_ibnorm.base.errors import bad_input
from hf_ibnorm.checks import check_number, nearest
from hf_ibnorm.report.tables import Table

from .config import RECIPES, read_command_line
from .settings import TrainConfig
from .throughput import DEVICES, Device

if TYPE_CHECKING:
    from .memory import StepMemory

ROOM = 0.9  # part of a device's memory to plan for; the rest is CUDA's context, NCCL's buffers and fragmentation
NETWORK = 25.0  # GB/s from a GPU to another machine, one way
MFU = 0.4  # part of a device's peak FLOP/s that is reached where nothing else limits it
MOST_GPUS = 1024  # the search for a sufficient number of GPUs ends here


@dataclass(frozen=True)
class Way:
    """A way to spread a model over processes."""

    parts: tuple[bool, bool, bool]  # whether a process holds only a part of weights, gradients, the optimizer's state
    optimizer: int  # bytes of that state a parameter: AdamW's numbers, with DeepSpeed a copy of the weights
    formula: str  # the memory of a process, in words


ALONE = "one process"
_WHOLE, _PARTS = (False,) * 3, (True,) * 3
_GATHERED = "buffers: weights and gradients of two blocks and of all outside of blocks"
_COPIED = "4 + (4 + 12)/N, a copy of the weights among them; buffers: two buckets of gradients"
WAYS = {
    ALONE: Way(_WHOLE, 8, "4 + 4 + 8 bytes a parameter"),
    "ddp": Way(_WHOLE, 8, "4 + 4 + 8 bytes a parameter; gradients live in the buckets that are reduced"),
    "fsdp2": Way(_PARTS, 8, f"(4 + 4 + 8)/N; {_GATHERED}"),
    "deepspeed_zero2": Way((False, True, True), 12, _COPIED),
    "deepspeed_zero3": Way(_PARTS, 12, "(4 + 4 + 12)/N; buffers: as with fsdp2, and as with deepspeed_zero2"),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs to plan for; ValueError where a number is out of range."""

    name: str  # of the device, as given on the command line
    device: Device
    gpus: int
    per_node: int  # GPUs of a machine
    mfu: float  # part of the peak FLOP/s that is reached

    def __post_init__(self) -> None:
        check_number("gpus", self.gpus, 1)
        check_number("gpus_per_node", self.per_node, 1)
        check_number("mfu", self.mfu, 0.01, 1.0)
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(f"gpus: got {self.gpus}, must be a multiple of gpus_per_node = {self.per_node}, or less")

    @classmethod
    def of(cls, device: str, gpus: int, per_node: int, mfu: float) -> "Cluster":
        """GPUs of a kind that the command line names."""
        known = {_word(name): name for name in DEVICES}
        if (word := _word(device)) not in known:
            raise ValueError(f"device: got {device!r}, must be one of {', '.join(known)}{nearest(word, list(known))}")
        return cls(word, DEVICES[known[word]], gpus, per_node, mfu)

    @property
    def machines(self) -> int:
        return -(-self.gpus // self.per_node)

    @property
    def room(self) -> float:
        """GB of a GPU to plan for."""
        return ROOM * self.device.memory

    @property
    def link(self) -> float:
        """Bytes/s from a GPU to the next, one way."""
        return 1e9 * (self.device.link if self.machines == 1 else min(self.device.link, NETWORK))

    def config_file(self, way: str) -> Path | None:
        """The shipped config file for Accelerate, relative to the current folder if below it; None if there is none."""
        name = "multi_node" if way == "ddp" and self.machines > 1 else way
        path = RECIPES / "accelerate" / f"{name}.yaml"
        if not path.is_file():
            return None
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@dataclass(frozen=True)
class Estimate:
    """A run spread in one way: bytes on each GPU, and seconds a step."""

    way: str
    config: TrainConfig
    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    seconds: float

    @property
    def sizes(self) -> list[float]:
        """Bytes of each kind."""
        return [self.weights, self.gradients, self.optimizer, self.activations, self.buffers]

    @property
    def total(self) -> float:
        """GB in all."""
        return sum(self.sizes) / 1e9


class Plan:
    """A run on a cluster. A step's memory is counted once; `counts` are earlier ones, of the same model."""

    def __init__(self, config: TrainConfig, cluster: Cluster, counts: dict[Any, "StepMemory"] | None = None) -> None:
        self.cluster, self.config = cluster, config.spread_over(cluster.gpus)
        self.counts = {} if counts is None else counts
        # As train_lm refuses them: FSDP2 has no scaler for fp16 here.
        refused = {"fsdp2"} if config.mixed_precision == "fp16" else set()
        if config.trainable != "all" or config.teacher is not None:
            refused |= {"deepspeed_zero2", "deepspeed_zero3"}
        self.ways = [name for name in WAYS if (name == ALONE) == (cluster.gpus == 1) and name not in refused]

    def count(self, config: TrainConfig, way: str) -> "StepMemory":
        """The memory of a step, before anything is sharded."""
        stay = way != ALONE
        sizes = (config.per_device_train_batch_size, config.per_device_eval_batch_size)
        key = (*sizes, stay or config.gradient_accumulation_steps > 1, config.gradient_checkpointing, stay)
        if key not in self.counts:
            from .memory import step_memory

            self.counts[key] = step_memory(config, stay)
        return self.counts[key]

    def estimate(self, way: str, config: TrainConfig) -> Estimate:
        """Memory and time of one way."""
        step, n = self.count(config, way), self.cluster.gpus
        weights, gradients, optimizer = (1 / n if part else 1.0 for part in WAYS[way].parts)
        buffers = 0.0
        if WAYS[way].parts[0]:
            buffers += 2 * 4 * (step.outside + 2 * step.block)
        if way.startswith("deepspeed"):
            from .distribution import BUCKET

            buffers += 2 * 4 * min(BUCKET, step.parameters)
        return Estimate(
            way,
            config,
            step.weights * weights,
            step.gradients * gradients,
            WAYS[way].optimizer * step.trained * optimizer,
            step.activations,
            buffers,
            self.seconds(way, config, step),
        )

    def seconds(self, way: str, config: TrainConfig, step: "StepMemory") -> float:
        """Time of a step: its micro-batches, AdamW, and the communication that does not hide behind computing.

        A micro-batch takes as long as its arithmetic, or as writing its activations once and reading them twice.
        """
        device, n, times = self.cluster.device, self.cluster.gpus, config.gradient_accumulation_steps
        tokens = config.per_device_train_batch_size * config.block_size
        flops = tokens * step.flops_per_token * (4 / 3 if config.gradient_checkpointing else 1)
        arithmetic = flops / (device.flops(config.mixed_precision) * self.cluster.mfu)
        micro = max(arithmetic, 3 * step.activations / (1e9 * device.bandwidth))
        adamw = 28 * step.trained / (n if WAYS[way].parts[2] else 1) / (1e9 * device.bandwidth)
        gather, reduce = 2 * 4 * step.parameters, 4 * step.trained  # bytes: all-gathers of both passes, reduce-scatter
        sent, hidden = {
            ALONE: (0, 0.0),
            "ddp": (2 * reduce, micro * 2 / 3),  # an all-reduce is two reduce-scatters, beside the last backward pass
            "fsdp2": (times * (gather + reduce), times * micro),
            "deepspeed_zero2": (times * reduce + gather / 2, times * micro * 2 / 3),  # weights are gathered once
            "deepspeed_zero3": (times * (gather + reduce), times * micro),
        }[way]
        communication = sent * (n - 1) / n / self.cluster.link
        return times * micro + adamw + max(0.0, communication - hidden)

    def fits(self, estimate: Estimate) -> bool:
        return estimate.total <= self.cluster.room

    def candidates(self) -> Iterator[Estimate]:
        """Ways to make the same training, from the fastest to the most frugal."""
        ways = [way for way in (ALONE, "ddp", "fsdp2") if way in self.ways]
        frugal = replace(self.config, gradient_checkpointing=True)
        for way in ways:
            if not self.config.gradient_checkpointing:
                yield self.estimate(way, self.config)
            yield self.estimate(way, frugal)
        size = frugal.per_device_train_batch_size
        total = size * frugal.gradient_accumulation_steps * self.cluster.gpus
        while size:
            validation = min(size, frugal.per_device_eval_batch_size)
            smaller = replace(frugal, per_device_train_batch_size=size, per_device_eval_batch_size=validation)
            for way in ways:
                yield self.estimate(way, replace(smaller, global_batch_size=total).spread_over(self.cluster.gpus))
            size //= 2

    def advice(self) -> Estimate | None:
        """The first candidate that fits."""
        return next((candidate for candidate in self.candidates() if self.fits(candidate)), None)

    def flags(self, estimate: Estimate) -> list[str]:
        """The flags that turn the run into that of the estimate."""
        names = ["gradient_checkpointing", "per_device_train_batch_size", "per_device_eval_batch_size"]
        if self.config.global_batch_size is None:
            names.append("gradient_accumulation_steps")
        values = {name: getattr(estimate.config, name) for name in names}
        return [f"--{name} {value}".lower() for name, value in values.items() if value != getattr(self.config, name)]

    def otherwise(self) -> str:
        """Where nothing fits: how much the most frugal candidate takes, and where it would fit."""
        *_, least = self.candidates()
        would = sorted((device.memory, name) for name, device in DEVICES.items() if least.total <= ROOM * device.memory)
        places = [f"{self.cluster.gpus} × {_word(would[0][1])}"] if would else []
        gpus = self.cluster.gpus
        while (gpus := 2 * gpus) <= MOST_GPUS:
            with suppress(ValueError):  # so many GPUs cannot have equal shares of the batch
                more = Plan(least.config, replace(self.cluster, gpus=gpus), self.counts)
                if "fsdp2" in more.ways and more.fits(more.estimate("fsdp2", more.config)):
                    places.append(f"{gpus} × {self.cluster.name} with fsdp2")
                    break
        candidate = " ".join([least.way, *self.flags(least)])
        would_do = " or ".join([*places, "a smaller model or block_size"])
        return f"nothing fits: {candidate} still takes {least.total:.2f} GB; what would do: {would_do}"

    def command(self, advised: Estimate, words: list[str]) -> str:
        """The command that starts the run; `words` are its words after the program's name."""
        cluster, path = self.cluster, self.cluster.config_file(advised.way)
        launcher = "python"
        if path is not None:
            launcher = f"accelerate launch --config_file {shlex.quote(str(path))} --num_processes {cluster.gpus}"
        if cluster.machines > 1:
            launcher += f" --num_machines {cluster.machines} --machine_rank RANK --main_process_ip ADDRESS"
        return " ".join([launcher, "-m train_lm", shlex.join(words), *self.flags(advised)])


def _word(name: str) -> str:
    """A name of `DEVICES` as it is given on the command line."""
    return name.lower().replace(" ", "-")


def _print(recipe: str, plan: Plan, words: list[str]) -> None:
    """The plan, in at most 120 columns but for the command."""
    config, cluster, device = plan.config, plan.cluster, plan.cluster.device
    step = plan.count(config, plan.ways[0])
    parameters, trained = step.parameters, step.trained
    part = "" if trained == parameters else f" ({trained:,} trained: only these have gradients and optimizer)"
    size, times = config.per_device_train_batch_size, config.gradient_accumulation_steps
    print(
        f"{recipe}: {parameters:,} parameters{part}; {cluster.gpus} × {cluster.name} of {device.memory:g} GB, "
        f"{cluster.machines} machine{'s' * (cluster.machines > 1)}; "
        f"a step: {cluster.gpus} × {times} × {size} sequences of {config.block_size} tokens\n"
    )
    table = Table(["GB on each GPU", "weights", "gradients", "optimizer", "activations", "buffers", "sum"])
    table.columns += [f"<= {cluster.room:g}", "s a step", "B tokens/day", "days"]
    for estimate in (plan.estimate(way, config) for way in plan.ways):
        tokens, seconds = cluster.gpus * times * size * config.block_size, estimate.seconds
        row = [estimate.way, *(f"{held / 1e9:.2f}" for held in estimate.sizes), f"{estimate.total:.2f}"]
        row += ["yes" if plan.fits(estimate) else "no", f"{seconds:.3g}", f"{tokens / seconds * 86400 / 1e9:.4g}"]
        table.rows.append([*row, f"{seconds * config.max_steps / 86400:.3g}"])
    table.print()
    print()
    for way in plan.ways:
        file = "" if cluster.config_file(way) or way == ALONE else " (no config file)"
        print(f"{way}: {WAYS[way].formula}{file}")
    model = 4 * parameters / 1e9
    whole = model + 8 * trained / 1e9
    kept = 1 + bool(config.checkpoint_every) * config.keep_last
    kept += config.max_steps // config.keep_every if config.keep_every else 0
    print(
        "activations: the most of all else that is alive in a micro-batch or in validation, counted without compile\n"
        f"time: {cluster.mfu:.0%} of {device.flops(config.mixed_precision) / 1e12:g} TFLOP/s, memory of "
        f"{device.bandwidth:g} GB/s, {cluster.link / 1e9:g} GB/s between GPUs: assumed\n"
        f"checkpoint: {whole:.3g} GB on disk, and in main memory of the first process while it is written;\n"
        f"disk in all: {kept * whole + 2 * model:.3g} GB, with the checkpoints that are kept and the final model"
    )
    if config.mixed_precision == "bf16" and not device.bfloat16:
        print(f"note: {cluster.name} has no tensor cores for bf16; the times are those of --mixed_precision fp16")
    advised = plan.advice()
    if advised is None:
        print(f"\n{plan.otherwise()}")
        return
    advice = " ".join([advised.way, *plan.flags(advised)])
    print(f"\nadvice: {advice}: {advised.total:.2f} GB, {advised.seconds:.3g} s a step")
    print(plan.command(advised, words))


def _main() -> None:
    parser = OneLineParser(
        prog="train_lm.plan",
        description="Memory on each GPU, time and disk that a recipe would take, and how to start it. Every field of "
        "the recipe can be set as a flag after it, as for train_lm.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a shipped recipe; comes first")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in all (default: %(default)s)")
    parser.add_argument("--device", required=True, help=f"their kind: {', '.join(map(_word, DEVICES))}")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs of a machine (default: %(default)s)")
    parser.add_argument(
        "--mfu", type=float, default=MFU, help="part of the peak FLOP/s that is reached (default: %(default)s)"
    )
    parser.add_argument("--run_dir", help="directory of the run (default: runs/RECIPE)")
    arguments, fields = parser.parse_known_args()
    require_extra("train", "accelerate", "datasets", "filelock", "tensorboard", "tokenizers")
    run_dir = arguments.run_dir or f"runs/{Path(arguments.recipe).stem}"
    words = ["--config", arguments.recipe, *fields, "--run_dir", run_dir]
    config = read_command_line(words)
    quiet_libraries()
    with bad_input():
        cluster = Cluster.of(arguments.device, arguments.gpus, arguments.gpus_per_node, arguments.mfu)
        plan = Plan(config, cluster)
        plan.count(plan.config, plan.ways[0])  # the model's own errors
    _print(arguments.recipe, plan, words)


def main() -> NoReturn:
    """Plan a run: `RECIPE --gpus N --device NAME [any field]`."""
    run_command(_main, lower="the sizes of the model")


if __name__ == "__main__":
    main()
