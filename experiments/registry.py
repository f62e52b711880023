"""The experiments by name. Each is a module of its own, imported when it is asked for."""

from importlib import import_module

from ..errors import UserError, unknown
from .datasets import is_file_name
from .experiment import Experiment
from .gpt_figures import FIGURES

# Name: the module that has it in capitals, alone or in a table of several; and its title.
EXPERIMENTS = {
    "quickstart": ("quickstart", "COMET against the standard MLP on built-in data (images, robot "
                                 "arm)"),
    "fair": ("fair", "the fair fight: each model with its best setting, from equal budgets"),
    "fig2": ("fig2", "Figure 2: input similarity against mask and activation similarity"),
    "fig3": ("fig3", "Figure 3: neuron utilisation of random networks on CIFAR10, then CIFAR100"),
    "fig4": ("fig4", "Figure 4: CIFAR10, 4-layer MLP, SGD lr 1e-4"),
    "fig5": ("fig5", "Figure 5: SVHN, ViT and MLP-Mixer"),
    "fig6": ("fig6", "Figure 6: CIFAR10, ViT and MLP-Mixer"),
    "fig7": ("fig7", "Figure 7: CIFAR100, ViT and MLP-Mixer"),
    "fig8": ("fig8", "Figure 8: Tiny ImageNet, ViT and MLP-Mixer"),
    "fig11": ("fig11", "Figure 11: CIFAR10, 4-layer MLP, SGD lr 1e-3"),
    "fig33": ("fig33", "Figure 33: SARCOS, 4-layer MLP, SGD lr 1e-2"),
    "fig34": ("fig34", "Figure 34: CIFAR10, ten activations, SGD with momentum, lr 1e-3"),
    "gpt": ("gpt_report", "GPT-2 on text: any size, tokenizer, learning rate, batch and precision"),
    **{name: ("gpt_report", figure.title(name)) for name, figure in FIGURES.items()},
    "routing": ("routing", "COMET in a ViT and a Mixer, routed by what a block has learnt or by "
                           "the input alone"),
    "routers": ("routers", "other routing networks (appendix A.7): their masks, accuracy and cost"),
    "softmoe": ("softmoe", "Soft MoE (arXiv 2409.00879): one expert against several, and which of "
                           "them an input needs"),
}


def experiment(name: str) -> Experiment:
    """Return the experiment called `name`.

    Raises
    ------
    UserError
        If there is none.
    """
    if is_file_name(name):
        raise UserError(f"{name} is a file of data: compare models on it with comet-np run "
                        f"quickstart --datasets {name} (of a CSV file also --target COLUMN)")
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    module = import_module(f".{EXPERIMENTS[name][0]}", __package__)
    found: Experiment = (module.EXPERIMENTS[name] if hasattr(module, "EXPERIMENTS") else
                         module.EXPERIMENT)
    return found
