"""How every benchmark here reports: figures with the machine and the versions they were measured with."""

import csv
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_ibnorm.files import cpu_name


def report(figures: dict[str, Any], packages: tuple[str, ...], repeats: int, output: Path | None) -> None:
    """Print the figures, and write them to `output` as a CSV file of one row."""
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "repeats": repeats,
        **figures,
    }
    for name, value in row.items():
        print(f"{name:24}{value}")
    if output:
        with output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
