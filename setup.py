"""Packaging of COMET-NP: `backends`, `experiments` and `benchmarks` install inside `comet_np`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INSIDE = ("backends", "experiments", "benchmarks")  # top level here, comet_np.NAME when installed


def packages() -> list[str]:
    """Return the installed names of all packages."""
    inside = [f"comet_np.{name}" for top in INSIDE
              for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))]
    return find_packages(include=["comet_np", "comet_np.*"]) + inside


def description() -> str:
    """Return the README for a package index, where only links to the outside lead anywhere."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[.*\]\((?!http).*\)\n\n", "", text, flags=re.MULTILINE)  # images
    return re.sub(r"\[([^][]*)\]\((?!http)[^()]*\)", r"\1", text)


if __name__ == "__main__":
    plots = ["matplotlib>=3.8"]
    tests = ["pytest>=8", "pytest-xdist>=3"]
    files = ["safetensors>=0.4"]
    text = ["tokenizers>=0.20"]
    estimators = ["scikit-learn>=1.6"]
    setup(
        name="comet-np",
        version="0.8.0",
        description="The reference implementation of COMET (arXiv 2410.08003) on NumPy and CuPy",
        license="BSD-3-Clause",
        author="The COMET-NP authors",
        keywords="COMET mixture-of-experts k-winner-take-all conditional-computation numpy cupy",
        classifiers=[
            "Development Status :: 4 - Beta", "Environment :: Console", "Environment :: GPU",
            "Intended Audience :: Science/Research", "Programming Language :: Python :: 3",
            "Topic :: Scientific/Engineering :: Artificial Intelligence", "Typing :: Typed"],
        project_urls={"Paper": "https://arxiv.org/abs/2410.08003"},
        long_description=description(),
        long_description_content_type="text/markdown",
        python_requires=">=3.10",
        packages=packages(),
        py_modules=["comet_np_pytest"],
        package_dir={"comet_np": "comet_np", **{f"comet_np.{name}": name for name in INSIDE}},
        package_data={"comet_np": ["py.typed"],
                      "comet_np.conformance.vectors": ["FORMAT.md", "schema.json", "reader.c",
                                                       "data/*/*"],
                      "comet_np.backends": ["kernels/*.cu", "kernels/*.cuh"]},
        install_requires=["numpy>=2.0", "scipy>=1.11"],
        extras_require={
            "plots": plots,
            "tests": tests,
            "crosscheck": ["torch>=2.4", "jax>=0.4.30", "transformers>=4.56", "timm>=1",
                           "jsonschema>=4.18", *files, *text],
            "safetensors": files,
            "text": text,
            "sklearn": estimators,
            "images": ["Pillow>=9.1"],
            "bfloat16": ["ml_dtypes>=0.4"],
            "mpi": ["mpi4py>=4"],
            "cuda12": ["cupy-cuda12x[ctk]>=14"],
            "cuda13": ["cupy-cuda13x[ctk]>=14"],
            "docs": ["sphinx>=8", "myst-parser>=4", "numpydoc>=1.8", "furo>=2024.8",
                     "sphinx-mathjax-offline>=0.0.2", *estimators],
            "dev": [*plots, *tests, "ruff", "mypy"],
        },
        entry_points={"console_scripts": ["comet-np = comet_np.experiments.cli:main"],
                      "pytest11": ["comet_np_pytest = comet_np_pytest"]},
    )
