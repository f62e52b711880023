"""Test vectors: cases that travel as files, see ``FORMAT.md`` beside this file."""

from .files import Case, read, read_all, write

__all__ = ["Case", "read", "read_all", "write"]
