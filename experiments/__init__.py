"""Experiments: data sets, the training loop, one module a figure, and the command `comet-np`."""

if __name__ != "comet_np.experiments":
    # Under a second name every class here would exist twice.
    raise ImportError('import this package as "comet_np.experiments", not as "experiments"')
