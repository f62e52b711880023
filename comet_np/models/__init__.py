"""Models: one module each, with the same functions beside the class of its configuration.

``init(config, seed, backend, dtype) -> (params, fixed)``,
``forward(x, params, fixed, config, masks, at) -> (y, cache)``,
``backward(dy, cache, params, grads, config, input_gradient) -> dx``,
``parameter_count(config) -> int``.
"""

import sys
from types import ModuleType
from typing import Any


def module_of(config: Any) -> ModuleType:
    """Return the model that a configuration is of: the module in which its class is defined."""
    return sys.modules[type(config).__module__]
