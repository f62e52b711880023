"""Models: one module each, with the same functions beside the class of its configuration.

``init(config, seed, backend, dtype) -> (params, fixed)``,
``forward(x, params, fixed, config, masks, at) -> (y, cache)``, where `masks` is what a gate would
say, ``choice`` in a mixture of experts,
``backward(dy, cache, params, grads, config, input_gradient) -> dx``,
``parameter_count(config) -> int``.

Some have more, for what training writes down: ``quantities(params, cache, y)``, all that a forward
pass read and made, by name; ``counts(cache, config)``, sums over examples, a metric each.
"""

import sys
from types import ModuleType
from typing import Any


def module_of(config: Any) -> ModuleType:
    """Return the model that a configuration is of: the module in which its class is defined."""
    return sys.modules[type(config).__module__]
