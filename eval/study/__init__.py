"""Studies: the same training for several norms, learning rates and seeds, and what the differences are worth."""

from pathlib import Path

STUDIES = Path(__file__).parents[1] / "studies"


def shipped_studies() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))
