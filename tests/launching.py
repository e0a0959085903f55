"""Training in several processes, as a user starts it: `accelerate launch` with a shipped config file."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from warm import python

# Where `make test-slow` puts DeepSpeed, apart from the rest.
DEEPSPEED = Path(sys.prefix) / "deepspeed"
MODULE = ("-m", "train_lm")
CONFIGS = Path(__file__).parents[1] / "train_lm" / "recipes" / "accelerate"

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None and not DEEPSPEED.is_dir(), reason="needs DeepSpeed (make .venv/.deepspeed)"
)

SCRIPT = """
import sys
from train_lm.__main__ import main
sys.path.insert(0, {tests!r})
import train_lm.corpus
from training import pages

if __name__ == "__main__":
    train_lm.corpus.load_corpus = pages
    {before}
    main()
"""


def program(folder: Path, before: str = "") -> Path:
    """A program in `folder` that is `python -m train_lm` on the first pages of the corpus, after the code `before`."""
    path = folder / "small_corpus.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), before=before.replace("\n", "\n    ")))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, config: str, *flags: str, processes: int = 2, launcher=(), cwd=None) -> subprocess.Popen:
    """Begin to run `script`, a path or `MODULE`, in so many processes here, spread as a shipped config file says."""
    apart = config.startswith("deepspeed") and find_spec("deepspeed") is None
    begin = python(DEEPSPEED) if apart else python()
    command = [begin, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", str(processes), *(launcher or ["--main_process_port", str(free_port())])]
    # Two processes on one GPU would ask for a second.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *(script if script is MODULE else [str(script)]), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
    )


def launch(script, config: str, *flags: str, **how) -> subprocess.CompletedProcess:
    """The same, to its end."""
    started = start(script, config, *flags, **how)
    out, err = started.communicate()
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)
