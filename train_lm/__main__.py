"""The command `python -m train_lm` (installed as `hf-ibnorm-train`)."""

import sys
from typing import NoReturn

from hf_ibnorm.base.command import quiet_libraries, require_extra, run_command


def _main() -> None:
    require_extra("train", "accelerate", "datasets", "filelock", "tensorboard", "tokenizers")
    from .config import read_command_line

    config = read_command_line(sys.argv[1:])
    from .train import train  # only now: it imports torch, which takes longer than to refuse a wrong word

    quiet_libraries()
    train(config)


def main() -> NoReturn:
    """Pretrain a model: `--config RECIPE --run_dir DIR [any field]`."""
    run_command(_main, lower="per_device_train_batch_size or block_size, or set gradient_checkpointing")


if __name__ == "__main__":
    main()
