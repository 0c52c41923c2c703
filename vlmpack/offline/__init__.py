"""From a corpus to packs on disk: index, plan, prepack, load. Each step is idempotent and resumable."""

from vlmpack.offline.engine import Engine
from vlmpack.offline.index import Index, IndexedFile, build_index, index_file
from vlmpack.offline.materialise import materialise
from vlmpack.offline.packed import PackedFolder, load_packed
from vlmpack.offline.plan import PlanFolder, PlanSettings, build_plan
from vlmpack.offline.prepack import prepack
from vlmpack.offline.settings import IndexSettings

__all__ = [
    "Engine",
    "Index",
    "IndexSettings",
    "IndexedFile",
    "PackedFolder",
    "PlanFolder",
    "PlanSettings",
    "build_index",
    "build_plan",
    "index_file",
    "load_packed",
    "materialise",
    "prepack",
]
