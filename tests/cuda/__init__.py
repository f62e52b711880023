"""GPU code shown right without a GPU: `strict_cupy` stands for cupy, `shim` runs its kernels."""
