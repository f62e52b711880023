"""Weights under published names, on the device."""

import numpy as np
import pytest

from comet_np import interop
from comet_np.backends import BackendError, backend_of
from comet_np.models import gpt2, mixer, vit
from comet_np.models.gpt2 import GPT2Config
from comet_np.models.mixer import MixerConfig
from comet_np.models.vit import ViTConfig
from comet_np.tree import leaves

VIT = ViTConfig((3, 8, 12), 4, 5, 12, 2, 3, 20)
MIXER = MixerConfig((3, 8, 12), 4, 5, 12, 2, 14, 10)
GPT2 = GPT2Config(11, 9, 8, 2, 2, 12)


@pytest.mark.parametrize("style", ["published", "huggingface", "timm", "transformers", "mixer",
                                   "gpt2"])
def test_names_go_there_and_back(style, gpu):
    if style == "mixer":
        trees = mixer.init(MIXER, backend=gpu)
        named = interop.mixer_to_torch(*trees, MIXER)
        again = interop.mixer_from_torch(named, MIXER)
    elif style == "gpt2":
        trees = gpt2.init(GPT2, backend=gpu)
        named = interop.gpt2_to_torch(*trees, GPT2)
        tied = named["transformer.wte.weight"]
        again = interop.gpt2_from_torch(named | {"lm_head.weight": tied.copy()}, GPT2)
        with pytest.raises(BackendError, match=r"two backends are mixed \(cupy and numpy\)"):
            interop.gpt2_from_torch(named | {"lm_head.weight": gpu.to_host(tied)}, GPT2)
    else:
        trees = vit.init(VIT, backend=gpu)
        named = interop.vit_to_torch(*trees, VIT, style)
        again = interop.vit_from_torch(named, VIT)
        name = next(name for name in named if "pos" in name)
        with pytest.raises(BackendError, match=r"two backends are mixed \(cupy and numpy\)"):
            interop.vit_from_torch(named | {name: gpu.to_host(named[name])}, VIT)
    assert all(backend_of(array) is gpu for array in named.values())
    for ours, theirs in zip(leaves(again), leaves(trees), strict=True):
        assert backend_of(ours) is gpu
        np.testing.assert_array_equal(gpu.to_host(ours), gpu.to_host(theirs))


def test_files_are_written_from_the_device(gpu, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    params, fixed = vit.init(VIT, backend=gpu)
    named = interop.vit_to_torch(params, fixed, VIT, "huggingface")
    interop.save_safetensors(tmp_path / "file", named)
    for name, array in interop.load_safetensors(tmp_path / "file").items():
        np.testing.assert_array_equal(array, gpu.to_host(named[name]))
