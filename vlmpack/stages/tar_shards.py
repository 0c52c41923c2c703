"""Tar shards: samples of several files in tar archives, as WebDataset has them, read in order.

    shard-000.tar
        000017.jpg  000017.json     one row: what comes before the first dot is its name
        000018.jpg  000018.txt      the next

Nothing is extracted: members are read into memory, their names lead nowhere, and links are refused. A place
is a shard and a byte, so a run goes on at once. What is broken in a shard is refused, and reading goes on
with the next shard.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, TypedDict

from torch.utils.data import IterableDataset, get_worker_info

from vlmpack.errors import ConfigError, SampleError
from vlmpack.samples import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from io import BufferedReader

IMAGES: Final = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"})
"""Extensions of images."""


class TarPlace(TypedDict):
    """Where reading stands; plain values."""

    shard: int
    """Of this worker's shards."""
    offset: int
    """Byte of the shard at which the next row begins."""


@dataclass(kw_only=True)
class _Group:
    """The members of one row."""

    name: str
    images: list[bytes] = field(default_factory=list)
    columns: dict[str, object] = field(default_factory=dict)
    text: str | None = None
    fault: SampleError | None = None


class TarShards(IterableDataset[Any]):
    """Rows out of tar shards, for `VQADataset`.

    Images become the column `images`, in their order in the shard. The columns of a `.json` object are the
    row's columns. A `.txt` becomes one turn, the answer to `prompt`, where the object has no conversation.
    Members of other kinds are left out. Rows are named "shard/name".

    Args:
        shards: Paths of uncompressed tar files; each worker reads every W-th of them.
        prompt: What the user asks where there is only a text.
        max_member_bytes: Larger members are refused.

    Raises:
        ConfigError: If there is no shard, or one does not exist or is compressed.
    """

    splits_itself = True
    key_column = "__key__"

    def __init__(
        self,
        shards: Iterable[str | Path],
        *,
        prompt: str = "Describe the image.",
        max_member_bytes: int = 256 << 20,
    ) -> None:
        self.shards = tuple(Path(shard) for shard in shards)
        self._prompt = prompt
        self._max_member_bytes = max_member_bytes
        if not self.shards:
            raise ConfigError("there is no tar shard; shards is empty")
        for shard in self.shards:
            if not shard.is_file():
                raise ConfigError(f"there is no tar shard {shard}")
            if shard.suffix in {".gz", ".tgz", ".bz2", ".xz", ".zst"}:
                raise ConfigError(
                    f"{shard} is compressed, so no place in it can be found again; unpack it to .tar (images "
                    "are compressed already), or load it with datasets.load_dataset('webdataset', ...)"
                )
        self._place = TarPlace(shard=0, offset=0)
        self._saved: TarPlace | None = None

    def state_dict(self) -> TarPlace:
        """Return where reading stands, behind the row that came last."""
        return self._saved.copy() if self._saved is not None else self._place.copy()

    def load_state_dict(self, state: TarPlace) -> None:
        """Begin the next pass behind the row that came last when the state was saved.

        Args:
            state: From `state_dict` over the same shards, by the same worker of as many.
        """
        self._saved = state

    def __iter__(self) -> Iterator[dict[str, object] | Refusal]:
        worker = get_worker_info()
        mine = self.shards[worker.id :: worker.num_workers] if worker else self.shards
        saved, self._saved = self._saved, None
        self._place = TarPlace(shard=0, offset=0) if saved is None else saved.copy()
        first, offset = self._place["shard"], self._place["offset"]
        for number, shard in enumerate(mine[first:], first):
            try:
                with shard.open("rb") as file:
                    for group, end in self._groups(file, offset):
                        self._place = TarPlace(shard=number, offset=end)
                        yield self._row(shard, group)
            except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                self._place = TarPlace(shard=number + 1, offset=0)
                yield Refusal(
                    key=shard.name,
                    reason="source_error",
                    message=(
                        f"the rest of shard {shard} cannot be read: {type(error).__name__}: {error!s:.300}"
                    ),
                    numbers={"exception": type(error).__name__},
                )
            offset = 0
            self._place = TarPlace(shard=number + 1, offset=0)

    def _groups(self, file: BufferedReader, offset: int) -> Iterator[tuple[_Group, int]]:
        """Yield the members of each row, and the byte at which the next row begins."""
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            group: _Group | None = None
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if member.isdir():
                    continue
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                name = str(path.with_name(stem)) if stem else member.name
                if group is not None and name != group.name:
                    yield group, member.offset
                    group = None
                group = group or _Group(name=name)
                self._add(group, archive, member, extension.lower())
            if group is not None:
                yield group, archive.offset

    def _add(self, group: _Group, archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
        name = f"member {member.name!r:.200}"
        if not member.isfile():
            group.fault = SampleError("bad_row", f"{name} is a link or a device, not a file")
            return
        if member.size > self._max_member_bytes:
            group.fault = SampleError(
                "bad_row",
                f"{name} has {member.size:,} bytes, over max_member_bytes {self._max_member_bytes:,}",
                num_bytes=member.size,
            )
            return
        kind = extension.rpartition(".")[2]
        if kind not in IMAGES | {"json", "txt"}:
            return
        opened = archive.extractfile(member)
        data = b"" if opened is None else opened.read()
        if len(data) < member.size:
            raise tarfile.ReadError(f"{name} ends early: {len(data)} of {member.size} bytes")
        try:
            _fill(group, kind, data)
        except (ValueError, RecursionError) as error:
            group.fault = SampleError("bad_row", f"{name}: {error!s:.300}")

    def _row(self, shard: Path, group: _Group) -> dict[str, object] | Refusal:
        key = f"{shard.name}/{group.name}"
        if group.fault is not None:
            return Refusal.of(key, group.fault)
        row: dict[str, object] = {"images": list(group.images), **group.columns, self.key_column: key}
        if group.text is not None and not row.keys() & {"texts", "messages", "conversations"}:
            row["texts"] = [{"user": self._prompt, "assistant": group.text}]
        return row


def _fill(group: _Group, kind: str, data: bytes) -> None:
    """Add a member's content.

    Raises:
        ValueError: If it is not what its extension says.
    """
    if kind == "json":
        columns = json.loads(data)
        if not isinstance(columns, dict):
            raise ValueError(f"a .json member must be an object, got {type(columns).__name__}")
        group.columns = columns
    elif kind == "txt":
        group.text = data.decode("utf-8")
    else:
        group.images.append(data)
