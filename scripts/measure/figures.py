"""The figures of a measurement, kept for whoever wants to compare them."""

import json
from pathlib import Path


def write_figures(path: Path | None, figures: dict) -> None:
    """As JSON, in a folder that need not be there yet; path: None where nobody asked for it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
