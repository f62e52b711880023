"""The names of the PyTorch MLP-Mixer on which the paper builds, a sequence of modules."""

from collections.abc import Mapping
from typing import Any

from ..models import mixer
from ..models.mixer import Branch, MixerConfig, MixerParams
from ..tree import check_shapes
from .places import Place, fixed_to_places, from_places, layer, routing_places, to_places
from .torch_mlp import check_mapping

Array = Any
Tree = Any

FIRST = 2  # the number of the first block in the sequence: patches are cut and mapped before


def places_of(config: MixerConfig) -> tuple[MixerParams, Tree]:
    """Return the places of the parameters, and of the fixed weights."""
    patches, branches, norm, head = mixer.shapes(config)
    ats = [f"{FIRST + i // 2}.{i % 2}" for i in range(len(branches))]
    last = FIRST + config.depth
    return MixerParams(
        layer(patches, "1"),
        tuple(Branch(layer(branch.norm, f"{at}.norm"),
                     tuple(_map(layer(shape, f"{at}.fn.{n}"), across)
                           for n, shape in zip((0, 3), branch.mlp, strict=True)))
              for at, branch, across in zip(ats, branches, config.across, strict=True)),
        layer(norm, f"{last}"), layer(head, f"{last + 2}")  # the mean is between them
    ), routing_places(config, tuple(f"{at}.fn" for at in ats))


def _map(places: Any, across: bool) -> Any:
    """Return the places of a map; of tokens it is a convolution there, of kernel 1."""
    if not across:
        return places
    weight = places.weight
    return places._replace(weight=Place(weight.names, weight.shape, (*weight.shape, 1)))


def mixer_from_torch(named: Mapping[str, Array], config: MixerConfig) -> tuple[MixerParams, Tree]:
    """Return an MLP-Mixer's parameters and fixed weights from arrays under their PyTorch names.

    Parameters
    ----------
    named : mapping of str to array
        NumPy or CuPy arrays, or PyTorch tensors (as of ``module.state_dict()``), all of one dtype,
        under the names that `mixer_to_torch` writes.
    config : MixerConfig

    Returns
    -------
    params, fixed
        Copies, of the backend of the arrays; of tensors, NumPy arrays. `fixed` is a tuple of ()
        where the gate has no fixed weights, or others than one array an MLP.

    Raises
    ------
    UserError
        If tensors are missing, unexpected, or of another shape: the first of them are named; or if
        a dtype does not fit.
    BackendError
        If a value is no array of a backend, or two are of different ones.
    """
    check_mapping(named)
    return from_places(named, places_of(config), config)


def mixer_to_torch(params: MixerParams, fixed: Tree, config: MixerConfig) -> dict[str, Array]:
    """Return an MLP-Mixer's weights (or gradients of the same structure) under their PyTorch names.

    Parameters
    ----------
    params : MixerParams
    fixed : tree
        As `comet_np.models.mixer.init` returns it; () leaves it out, as with gradients.
    config : MixerConfig

    Returns
    -------
    dict of str to array
        Views where they can be, named by their place in the sequence of the code on which the paper
        builds (kentaroy47/vision-transformers-cifar10): the patches' map is ``1``, block i is
        ``{2 + i}``, its token mixing ``.0`` and its channel mixing ``.1``, each with ``norm``,
        ``fn.0`` and ``fn.3``; then norm and head. Routing weights, for which no code is published,
        are V in ``fn.spec.weight`` of each MLP, (H, T) or (H, D); of a routing stream U is beside
        it, in ``fn.spec_back.weight``, and E, whose columns are in the order of our patches, in
        ``spec_embedding.weight``.

    Raises
    ------
    UserError
        If the weights do not fit the configuration.
    """
    check_shapes(params, mixer.shapes(config), "this MixerConfig needs MixerParams")
    places, of_fixed = places_of(config)
    return to_places(params, places) | fixed_to_places(fixed, of_fixed)
