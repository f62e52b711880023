"""Benchmarks against PyTorch, JAX and the machine's limits, in one run: `comet-np bench`."""

if __name__ != "comet_np.benchmarks":
    raise ImportError('import this package as "comet_np.benchmarks", not as "benchmarks"')
