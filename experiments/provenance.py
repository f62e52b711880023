"""Where a number comes from: when, by which versions and on what machine it was computed."""

import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends import get_backend


def provenance(backend: str) -> dict[str, Any]:
    """Return when, by which versions and on what machine something is computed, for its record."""
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "comet-np": __version__,
            "git": _git_revision(), "python": platform.python_version(),
            "machine": platform.platform(), **get_backend(backend).describe()}


@cache
def _git_revision() -> str | None:
    """Return the revision of the checkout this runs from, or None if it is not one."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():  # installed, maybe within a repository of another's
        return None
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, text=True,
                                capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
