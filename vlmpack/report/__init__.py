"""A page about packs that a person wants to read: how full they are, what is in them, and what is not."""

from vlmpack.report.figures import Figures, figures_of
from vlmpack.report.page import write_report

__all__ = ["Figures", "figures_of", "write_report"]
