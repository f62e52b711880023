"""Parameters to and from other frameworks, as plain arrays under the names used there."""

from .torch_mlp import mlp_from_torch, mlp_to_torch

__all__ = ["mlp_from_torch", "mlp_to_torch"]
