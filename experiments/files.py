"""The files of a finished run, and the hashes by which they are known."""

from pathlib import Path
from typing import Any

from ..records import believed, digests, read_json, write_json

CONFIG, WEIGHTS, METRICS, RESULT = "config.json", "weights.npz", "metrics.jsonl", "result.json"


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of a finished run, with the hashes of the files that belong to it."""
    write_json(folder / RESULT, result | {"files": digests(folder, (CONFIG, WEIGHTS, METRICS))})


def read_result(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the result of a finished run, and the hashes of the files that belong to it."""
    with believed(folder / RESULT):
        result = read_json(folder / RESULT)
        return result, dict(result.pop("files"))
