"""The specification: one file an idea, forward and backward side by side.

Start with `routing` (equations 3 to 6), then `linear` (1), `activations` (2, 8) and `loss`.
"""
