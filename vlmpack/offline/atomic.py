"""Files that are there whole or not at all, and folders that one run writes at a time."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a draft's path beside `path`; the draft gets its name once the block ended well.

    The draft is on the disk before it is renamed, and the folder after it, so that not even a power cut
    leaves half a file under the final name. A draft that a kill left behind is written over by the next try.

    Args:
        path: The final name; its folder is made if need be.

    Yields:
        Where to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Args:
        path: An old file is replaced.
        text: Its content.
    """
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Make sure that a file or a folder is on the disk.

    Args:
        path: Which.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Let one run at a time write a folder. The system frees it when a process dies, however it dies.

    Args:
        folder: Made if need be.

    Raises:
        ConfigError: If another run is writing it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another run is writing {folder}; wait for it, or write to a folder of your own"
            ) from error
        yield
