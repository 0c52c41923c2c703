"""`python -m vlmpack.memory` writes the reference document's table of recommended settings."""

from __future__ import annotations

import sys

from vlmpack.memory.recommend import recommendation_table

sys.stdout.write("\n".join(recommendation_table()) + "\n")
