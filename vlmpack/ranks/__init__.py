"""Even ranks: as many batches for each, every sample once, alike loads, and a run that resumes exactly."""

from vlmpack.ranks.balance import Balance, balanced_steps
from vlmpack.ranks.even_ranks import EvenRanks, without_weight
from vlmpack.ranks.imbalance import LoadImbalance, StepLoads, load_imbalance
from vlmpack.ranks.loader import LoaderState, PackLoader
from vlmpack.ranks.order import epoch_order, even

__all__ = [
    "Balance",
    "EvenRanks",
    "LoadImbalance",
    "LoaderState",
    "PackLoader",
    "StepLoads",
    "balanced_steps",
    "epoch_order",
    "even",
    "load_imbalance",
    "without_weight",
]
