"""Every kernel compiles for the GPUs it is meant for, and keeps its numbers in registers."""

import pytest

from comet_np.backends import cupy_backend

from . import nvrtc, shim

LIBRARY = nvrtc.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs NVRTC: pip install "
                                                        "nvidia-cuda-nvrtc")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("file", shim.INSTANCES)
def test_kernels_compile_without_spills(file, arch):
    found = nvrtc.compile_kernels(LIBRARY, cupy_backend.source(file), shim.INSTANCES[file],
                                  cupy_backend.OPTIONS, arch)
    for name, resources in found.items():
        print(f"sm_{arch} {name:45} {resources.registers:4} registers, {resources.shared:5} bytes "
              "of shared memory")
        assert resources.spilled == 0, f"{name} spills {resources.spilled} bytes on sm_{arch}"


def test_cap_compiles_without_the_reduction_of_sm_80():
    nvrtc.compile_kernels(LIBRARY, cupy_backend.source("masks"), ["kwta<float, 4, 24>"],
                          cupy_backend.OPTIONS, 75)


def test_a_spill_is_seen():
    source = cupy_backend.source("masks").replace("(ITEMS + 40)", "(ITEMS + 8)")
    names = ["kwta<float, 4, 24>"]
    found = nvrtc.compile_kernels(LIBRARY, source, names, cupy_backend.OPTIONS, 90)
    assert found[names[0]].spilled > 0
