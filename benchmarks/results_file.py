"""How every benchmark here reports: figures with the machine and the versions they were measured with."""

import csv
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hf_ibnorm.report.environment import cpu_name, package_versions


def machine(packages: tuple[str, ...], repeats: int, device: str = "cpu") -> dict[str, Any]:
    """The columns that every row begins with."""
    names = (
        {"device": torch.cuda.get_device_name()} if device == "cuda" else {"cpu": cpu_name(), "cores": os.cpu_count()}
    )
    installed = package_versions()
    versions = {name: installed[name] or "" for name in packages}
    today = datetime.now(UTC).date().isoformat()
    return {"date": today, **names, "python": platform.python_version(), **versions, "repeats": repeats}


def report(figures: dict[str, Any], packages: tuple[str, ...], repeats: int, output: Path | None) -> None:
    """Print the figures, and write them to `output` as a CSV file of one row."""
    row = {**machine(packages, repeats), **figures}
    for name, value in row.items():
        print(f"{name:24}{value}")
    if output:
        _write([row], output)


def write_rows(
    rows: Iterable[dict[str, Any]], packages: tuple[str, ...], repeats: int, output: Path | None, device: str
) -> None:
    """Print rows of figures as they come, and write them all to `output` as a CSV file."""
    start, written = machine(packages, repeats, device), []
    for row in rows:
        print("  ".join(f"{value!s:{38 if not i else 10}}" for i, value in enumerate(row.values())), flush=True)
        written.append({**start, **row})
    if output:
        _write(written, output)


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
