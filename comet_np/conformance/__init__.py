"""Checks of other implementations: which mistake explains an output, and test vectors."""
