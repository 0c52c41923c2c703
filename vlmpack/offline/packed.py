"""Packs on disk -> packs, by number: what `PackLoader` takes, with exact resume on any number of ranks."""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from vlmpack.budget import PackBudget, SampleCost
from vlmpack.errors import ConfigError, SourceError
from vlmpack.images import MAX_PIXELS, empty_tiles, tile_image
from vlmpack.offline.plan import PlanSettings
from vlmpack.offline.settings import IndexSettings
from vlmpack.packing.assemble import PackedSequence
from vlmpack.stages.placeholders import ImageTokens

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from vlmpack.geometry import Tiling

    Int64s = npt.NDArray[np.int64]

_COSTS = ("tokens_per_sample", "images_per_sample", "patches_per_sample")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedIndex:
    """What a saved position is valid for."""

    digest: str
    """Of the plan that the packs were made from."""


class PackedFolder(Dataset[PackedSequence]):
    """The packs of a folder that `prepack` wrote, by number. Images are decoded when a pack is asked for.

    Indexing by an integer gives a pack; by (start, stop), the samples at these places of the pack-by-pack
    order, within one pack, which is how `PackLoader` splits a pack to make ranks even.

    Args:
        folder: With a manifest.json.
        decode: Decode images; without, packs have no tiles.

    Raises:
        ConfigError: If there is no whole manifest, or a shard is missing or another.
    """

    def __init__(self, folder: str | Path, *, decode: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        """What the folder holds."""
        self.index = PackedIndex(digest=self.manifest["plan"])
        """Names the plan."""
        settings = PlanSettings(**self.manifest["settings"]["plan"])
        self.budget: PackBudget = settings.budget
        """What a pack may hold."""
        self.tiling: Tiling = IndexSettings(**self.manifest["settings"]["index"]).pipeline().tiling()
        """How images are cut."""
        self._decode = decode
        self._shards = [row["shard"] for row in self.manifest["shards"] if row["packs"]]
        self._firsts = [0]
        samples, costs = [], []
        for row in self.manifest["shards"]:
            if row["packs"]:
                table = self._open(row, columns=list(_COSTS))
                self._firsts.append(self._firsts[-1] + table.num_rows)
                lists = table[_COSTS[0]].combine_chunks()
                samples.append(np.diff(lists.offsets.to_numpy()))
                costs.append([table[name].combine_chunks().values.to_numpy() for name in _COSTS])
        sizes = np.concatenate(samples) if samples else np.zeros(0, np.int64)
        self.starts: Int64s = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        """int64 [packs + 1]: where each pack begins in the pack-by-pack order of samples."""
        self.costs: Int64s = (
            np.concatenate([np.stack(each, axis=1) for each in costs]).astype(np.int64)
            if costs
            else np.zeros((0, 3), np.int64)
        )
        """int64 [samples, 3]: what each sample uses, pack by pack, in the order of `vlmpack.budget.AXES`."""
        self._cached: tuple[int, int, Any] | None = None
        self._files: dict[int, pq.ParquetFile] = {}

    def _open(self, row: dict[str, Any], columns: list[str]) -> Any:
        path = self.folder / row["shard"]
        if not path.is_file() or path.stat().st_size != row["bytes"]:
            raise ConfigError(f"{path} is missing or not what the manifest says; run prepack again")
        return pq.read_table(path, columns=columns)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer that the packs were made with, with its image tokens. Local files only."""
        return IndexSettings(**self.manifest["settings"]["index"]).load_tokenizer()

    def image_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Return the ids that stand for images and tiles.

        Args:
            tokenizer: From `load_tokenizer`.
        """
        tokens = ImageTokens.of(tokenizer, self.tiling)
        texts = [tokens.text, *tokens.all_texts]
        return {int(tokenizer.convert_tokens_to_ids(text)) for text in texts}

    def __len__(self) -> int:
        return int(self.starts.shape[0]) - 1

    def load_prefix(self) -> Int64s:
        """Return the ViT patches and the attention of all samples before each place. O(samples).

        Returns:
            int64 [samples + 1, 2], as `IndexedPacks.load_prefix`.
        """
        prefix = np.zeros((self.costs.shape[0] + 1, 2), np.int64)
        np.cumsum(self.costs[:, 2], out=prefix[1:, 0])
        np.cumsum(np.square(self.costs[:, 0]), out=prefix[1:, 1])
        return prefix

    def __getitem__(self, pack: int | tuple[int, int]) -> PackedSequence:
        """Return a pack, or some of its samples.

        Args:
            pack: Its number, or (start, stop) in the pack-by-pack order of samples, within one pack.

        Raises:
            IndexError: If there is no such pack, or the span leaves its pack.
            SourceError: If a picture in it cannot be decoded.
        """
        if isinstance(pack, tuple):
            start, stop = pack
            number = bisect.bisect_right(self.starts, start) - 1
        else:
            if not 0 <= pack < len(self):
                raise IndexError(f"pack {pack} of {len(self)}")
            number, start, stop = pack, int(self.starts[pack]), int(self.starts[pack + 1])
        if not self.starts[number] <= start < stop <= self.starts[number + 1]:
            raise IndexError(f"samples {start} to {stop} are not in one pack")
        first = start - int(self.starts[number])
        return self._sequence(self._row(number), first, first + stop - start)

    def _row(self, number: int) -> dict[str, Any]:
        """Return a pack as it is stored; the row group it is in stays in memory for the next one."""
        shard = bisect.bisect_right(self._firsts, number) - 1
        if shard not in self._files:
            self._files[shard] = pq.ParquetFile(self.folder / self._shards[shard], memory_map=True)
        file, at = self._files[shard], number - self._firsts[shard]
        group = 0
        while at >= file.metadata.row_group(group).num_rows:
            at -= file.metadata.row_group(group).num_rows
            group += 1
        if self._cached is None or self._cached[:2] != (shard, group):
            self._cached = (shard, group, file.read_row_group(group))
        return {
            name: column[at]
            for name, column in zip(self._cached[2].column_names, self._cached[2].columns, strict=True)
        }

    def _sequence(self, row: dict[str, Any], first: int, last: int) -> PackedSequence:
        tokens, images, patches = (row[name].as_py() for name in _COSTS)
        begin, end = sum(tokens[:first]), sum(tokens[:last])
        first_image, last_image = sum(images[:first]), sum(images[:last])
        sizes = row["image_sizes"].as_py()
        pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
        geometries = self.tiling.sample(pairs)[first_image:last_image]
        keys = tuple(row["keys"].as_py()[first:last])
        segments = _tensor(row["segment_ids"], begin, end)
        if first:
            segments = torch.where(segments > 0, segments - first, segments)
        return PackedSequence(
            input_ids=_tensor(row["input_ids"], begin, end),
            labels=_tensor(row["labels"], begin, end),
            segment_ids=segments,
            position_ids=_tensor(row["position_ids"], begin, end),
            tiles=self._tiles(row, geometries, pairs, first_image, last_image, keys),
            tiles_per_image=tuple(geometry.num_tiles for geometry in geometries),
            keys=keys,
            costs=tuple(
                SampleCost(num_tokens=tokens[i], num_images=images[i], num_patches=patches[i])
                for i in range(first, last)
            ),
            geometries=geometries,
            image_sizes=tuple(pairs[first_image:last_image]),
        )

    def _tiles(
        self, row: dict[str, Any], geometries: Any, pairs: Any, first: int, last: int, keys: tuple[str, ...]
    ) -> torch.Tensor:
        side = self.tiling.tile_size
        if not self._decode:
            return torch.empty((0, 3, side, side), dtype=torch.uint8)
        if row["tiles"].is_valid:
            per_image = row["tiles_per_image"].as_py()
            low, high = sum(per_image[:first]), sum(per_image[:last])
            stored = np.frombuffer(row["tiles"].as_buffer(), np.uint8).reshape(-1, side, side, 3)
            return torch.from_numpy(stored[low:high].copy()).permute(0, 3, 1, 2)
        tiles = empty_tiles(sum(geometry.num_tiles for geometry in geometries), side)
        at = 0
        for place, geometry in zip(range(first, last), geometries, strict=True):
            source = row["images"][place]["bytes"].as_py()
            try:
                tile_image(
                    source,
                    geometry,
                    tile_size=side,
                    out=tiles[at : at + geometry.num_tiles],
                    max_pixels=MAX_PIXELS,
                    expected_size=pairs[place],
                )
            except Exception as error:
                raise SourceError(
                    f"image {place} of the pack with {', '.join(keys)} cannot be decoded: {error}. Packing "
                    "with --pixels decodes every image, and refuses such samples"
                ) from error
            at += geometry.num_tiles
        return tiles

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cached": None, "_files": {}}


def _tensor(values: Any, begin: int, end: int) -> torch.Tensor:
    return torch.from_numpy(values.values.to_numpy()[begin:end].astype(np.int64))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of packs.

    Args:
        folder: Where `prepack` wrote.

    Raises:
        ConfigError: If there is none.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest["plan"], manifest["shards"], manifest["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder} holds no whole set of packs ({error}); run prepack to its end"
        ) from error
    return manifest


def load_packed(folder: str | Path, *, decode: bool = True) -> PackedFolder:
    """Return the packs of a folder, for a `PackLoader` or any `DataLoader`.

    Args:
        folder: Where `prepack` wrote.
        decode: Decode images; without, packs have no tiles.

    Raises:
        ConfigError: If there is no whole manifest, or a shard is missing.
    """
    return PackedFolder(folder, decode=decode)
