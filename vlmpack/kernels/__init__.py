"""The packing algorithms as numba kernels: arrays in, arrays out; numpy and numba only."""

from vlmpack.kernels.worst_fit_decreasing import worst_fit_decreasing

__all__ = ["worst_fit_decreasing"]
