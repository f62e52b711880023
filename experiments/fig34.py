"""Figure 34: CIFAR10, 4-layer MLP with ten activations, SGD with momentum, learning rate 1e-3."""

from .grid_report import CIFAR10_LAPTOP, SMOKE, grid

# The published list; its leaky rectifier has the slope 0.1, as ours.
ACTIVATIONS = ("gelu", "softplus", "relu", "leaky_relu", "tanh", "selu", "sigmoid", "silu", "elu",
               "mish")
SETTING = {"activation": ACTIVATIONS, "models": ("standard", "comet"), "p_k": (0.5,),
           "optimizer": "momentum"}

EXPERIMENT = grid(
    "fig34",
    smoke=SMOKE | SETTING | {"widths": (50,), "lr": 1e-3},
    laptop=CIFAR10_LAPTOP | SETTING | {"widths": (500,), "lr": 1e-2},
    paper={"datasets": ("cifar10",), "widths": (3000,), "lr": 1e-3, "epochs": 100, "seeds": 3}
    | SETTING,
)
