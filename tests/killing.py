"""Kill a training at random moments, resume it until it ends, and compare it with one that was never killed.

python tests/killing.py --kills 200 --folder DIR

Several processes, a noise norm, a stream that is shuffled and tokenized as it is read. Each attempt is real processes
that get a real SIGKILL: at start-up, at a random step, or while a checkpoint is being written. At the end of
each run the model must be bit-identical to that of the run never killed, and the metrics too, time and memory apart.
Attempts are forked from this process, which has done nothing but import, so that they need not import again.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.utils.tensorboard  # noqa: F401
from datasets import IterableDataset  # noqa: F401

import train_lm.train
from hf_ibnorm import load_corpus
from hf_ibnorm.base.command import quiet_libraries
from train_lm.config import read_command_line
from train_lm.metrics import MEASURED

STEPS, EVERY = 30, 3
PATIENCE = 120.0
"""Seconds after which an attempt hangs."""


def corpus(folder: Path) -> list[str]:
    """Write five files to stream and one to validate on; returns the flags that name them."""
    folder = folder / "corpus"
    folder.mkdir()
    pages = [text[i : i + 300] for text in load_corpus("sotu", "train")[:20] for i in range(0, 9000, 300)]
    for name, part in {"validation": pages[:20], **{f"train-{i}": pages[20 + 60 * i :][:60] for i in range(5)}}.items():
        lines = [json.dumps({"text": page}) + "\n" for page in part if page]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return ["--corpus", str(folder), "--streaming", "true", "--shuffle_buffer", "40"]


def settings(folder: Path) -> list[str]:
    """Flags of every attempt but its run directory."""
    return [
        *("--config", "tiny", *corpus(folder), "--cache_dir", str(folder / "cache"), "--resume", "auto"),
        *("--max_steps", str(STEPS), "--checkpoint_every", str(EVERY), "--eval_every", "10"),
        *("--per_device_train_batch_size", "2", "--model.norm_type", "layernormalnorm", "--model.dropout", "0.1"),
    ]


class Attempt:
    """One launch of a training in `run_dir`: its processes, alive until killed or done."""

    def __init__(self, run_dir: Path, flags: list[str], processes: int) -> None:
        self.run_dir, self.log = run_dir, run_dir.parent / f"{run_dir.name}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pids = [
            self._fork([*flags, "--run_dir", str(run_dir)], rank, processes, port) for rank in range(processes)
        ]

    def _fork(self, flags: list[str], rank: int, processes: int, port: int) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in world.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            quiet_libraries()
            train_lm.train.train(read_command_line(flags))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def alive(self) -> bool:
        """Whether any process still runs."""
        return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in self.pids)

    def kill(self, luck: random.Random) -> None:
        """SIGKILL to every process, in any order, one shortly after the other."""
        for i in luck.sample(range(len(self.pids)), len(self.pids)):
            os.kill(self.pids[i], signal.SIGKILL)
            time.sleep(luck.random() * 0.02)
        self.wait()

    def wait(self) -> list[int]:
        """Exit codes of the processes, once they have ended."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def rows(self) -> int:
        """Steps in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.run_dir / "checkpoints").glob(".step-*"))


def wait_for(attempt: Attempt, moment: str, luck: random.Random) -> bool:
    """Return at a random `moment`: true, or false if the attempt ended before."""
    end = time.monotonic() + PATIENCE
    if moment == "start":
        until = time.monotonic() + luck.random() * 2.5
        ready = lambda: time.monotonic() >= until  # noqa: E731
    elif moment == "step":
        rows = attempt.rows() + luck.randint(1, 2 * EVERY)
        ready = lambda: attempt.rows() >= rows  # noqa: E731
    else:
        while attempt.alive() and attempt.writing() and time.monotonic() < end:  # left over from the kill before
            time.sleep(0.001)
        for _ in range(luck.randint(0, 2)):
            while attempt.alive() and not attempt.writing():
                time.sleep(0.0005)
            while attempt.alive() and attempt.writing():
                time.sleep(0.0005)
        ready = attempt.writing
    while not ready():
        if not attempt.alive():
            return False
        if time.monotonic() > end:
            raise TimeoutError(f"{attempt.run_dir}: hangs, see {attempt.log}")
        time.sleep(0.0005)
    time.sleep(luck.random() * 0.01)
    return attempt.alive()


def result(run_dir: Path) -> tuple[bytes, list[dict]]:
    """What must be the same: the bytes of the final model, and the metrics without time and memory."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]
    return (run_dir / "final" / "model.safetensors").read_bytes(), rows


def run_to_end(run_dir: Path, flags: list[str], processes: int) -> None:
    attempt = Attempt(run_dir, flags, processes)
    if codes := [code for code in attempt.wait() if code]:
        raise SystemExit(f"{run_dir}: ended with {codes}:\n{attempt.log.read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many in all (default: %(default)s)")
    parser.add_argument("--kills_per_run", type=int, default=5, help="before a run may end (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="of each run (default: %(default)s)")
    parser.add_argument("--moment", choices=("start", "step", "checkpoint"), help="(default: each of them at times)")
    parser.add_argument("--fsdp", action="store_true", help="shard the model (default: a copy in each process)")
    parser.add_argument("--folder", type=Path, required=True, help="empty directory to work in")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.fsdp:  # what `accelerate launch` makes of train_lm/recipes/accelerate/fsdp2.yaml
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    luck, began = random.Random(arguments.seed), time.monotonic()
    flags = settings(arguments.folder)
    run_to_end(arguments.folder / "reference", flags, arguments.processes)
    expected = result(arguments.folder / "reference")

    kills = dict.fromkeys(("start", "step", "checkpoint"), 0)
    while_writing = runs = ended_before = 0
    while sum(kills.values()) < arguments.kills:
        run_dir = arguments.folder / f"run-{runs}"
        for _ in range(min(arguments.kills_per_run, arguments.kills - sum(kills.values()))):
            attempt = Attempt(run_dir, flags, arguments.processes)
            moment = arguments.moment or luck.choices(list(kills), weights=(1, 2, 2))[0]
            if not wait_for(attempt, moment, luck):
                ended_before += 1
                if codes := [code for code in attempt.wait() if code]:
                    raise SystemExit(f"{run_dir}: ended with {codes}:\n{attempt.log.read_text()[-3000:]}")
                break
            attempt.kill(luck)
            kills[moment] += 1
            while_writing += attempt.writing()
        run_to_end(run_dir, flags, arguments.processes)
        runs += 1
        if result(run_dir) != expected:
            raise SystemExit(f"{run_dir} differs from the run that was never killed")
        print(f"run {runs}: identical after {sum(kills.values())} kills", file=sys.stderr, flush=True)
    summary = {"kills": sum(kills.values()), **kills, "left_a_half_written_checkpoint": while_writing}
    summary |= {"runs": runs, "identical": runs, "seconds": round(time.monotonic() - began)}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
