"""Even ranks: as many batches for each, every sample once, and a run that resumes exactly."""

from vlmpack.ranks.loader import LoaderState, PackLoader
from vlmpack.ranks.order import epoch_order, even

__all__ = ["LoaderState", "PackLoader", "epoch_order", "even"]
