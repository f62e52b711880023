"""Checks of other implementations: which mistake explains an output, and test vectors."""

from .adapter import Unsupported

__all__ = ["Unsupported"]
