"""Every kernel compiles for the GPUs it is meant for, and keeps its numbers in registers."""

import importlib.util
import re
from pathlib import Path

import pytest

from comet_np.backends import cupy_kernels

from . import nvrtc, shim

LIBRARY = nvrtc.library()
CUPY = importlib.util.find_spec("cupy")
OF_CUPY = Path(CUPY.origin if CUPY else "", "..", "cuda", "compiler.py").resolve()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs NVRTC: pip install "
                                                        "nvidia-cuda-nvrtc")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("file", shim.INSTANCES)
def test_kernels_compile_without_spills(file, arch):
    found = nvrtc.compile_kernels(LIBRARY, cupy_kernels.source(file), shim.INSTANCES[file],
                                  arch)
    for name, resources in found.items():
        print(f"sm_{arch} {name:45} {resources.registers:4} registers, {resources.shared:5} bytes "
              "of shared memory")
        assert resources.spilled == 0, f"{name} spills {resources.spilled} bytes on sm_{arch}"


def test_cap_compiles_without_the_reduction_of_sm_80():
    nvrtc.compile_kernels(LIBRARY, cupy_kernels.source("masks"), ["kwta<float, 4, 24>"], 75)


def test_a_spill_is_seen():
    source = cupy_kernels.source("masks").replace("(ITEMS + 40)", "(ITEMS + 8)")
    names = ["kwta<float, 4, 24>"]
    found = nvrtc.compile_kernels(LIBRARY, source, names, 90)
    assert found[names[0]].spilled > 0


@pytest.mark.skipif(not OF_CUPY.exists(), reason="CuPy is not installed")
def test_the_options_are_those_of_cupy():
    assert f"options += ('{nvrtc.OPTIONS[-1]}',)" in OF_CUPY.read_text(encoding="utf-8")


def test_scores_are_compared_whole_where_others_are_flushed():
    """Under -ftz=true a comparison that is not our own takes subnormal scores for zero."""
    def comparisons(source):
        ptx = nvrtc.Program(LIBRARY, source, ["kwta<float, 1, 4>"],
                            "--gpu-architecture=compute_90").result("PTX").decode()
        return re.findall(r"setp?\.ge(?:\.f32)?\.f32", ptx), re.findall(r"setp\.\w+\.ftz\.f32", ptx)

    source = cupy_kernels.source("masks")
    ours, flushed = comparisons(source)
    assert len(ours) >= 4 * 3  # of 4 scores a thread: count, win, tie
    plain, flushed_plain = comparisons(source.replace("#ifdef __CUDACC__", "#if 0"))
    assert not plain and len(flushed_plain) >= len(flushed) + 4 * 3
