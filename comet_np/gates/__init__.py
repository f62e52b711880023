"""Gates: what the mask of a hidden layer is a function of.

=============  ============================================================================
Comet          the network's input, through a fixed routing network (the paper's model)
Layerwise      the layer's own input, through fixed weights
TopK           the layer's own pre-activation
Bernoulli      the number of the training example
ExampleTied    the number of the training example, but for neurons that are always active
Kept           nothing: bits computed before
=============  ============================================================================
"""

from .base import EVALUATION, Gate, Pass
from .bernoulli import Bernoulli, ExampleTied
from .comet import Comet
from .kept import Kept, keep
from .layerwise import Layerwise
from .top_k import TopK

__all__ = ["EVALUATION", "Bernoulli", "Comet", "ExampleTied", "Gate", "Kept", "Layerwise", "Pass",
           "TopK", "keep"]
