"""What the commands say: results on standard output, all else on standard error, errors in one line."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from vlmpack.errors import ConfigError, VlmpackError

STANDARD_OUTPUT = Path("-")
"""The file name that stands for standard output."""

_IN_WORKER = re.compile(r"\ACaught \w+ in DataLoader worker process.*\n[\w.]*Error: ", re.DOTALL)


def results(*, aside: bool = False) -> Console:
    """Return the console for results.

    Args:
        aside: Use standard error, because standard output carries something for machines.
    """
    return Console(stderr=aside, highlight=False)


def check_folder(option: str, file: Path | None) -> None:
    """Refuse a file in a folder that does not exist, before the work is done that it is to be written of.

    Args:
        option: The option that names it, for the message.
        file: Where something will be written; None and "-" are fine.

    Raises:
        ConfigError: If its folder is missing.
    """
    if file is not None and file != STANDARD_OUTPUT and not file.absolute().parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {file.parent}")


def write_json(plain: Mapping[str, object], file: Path | None) -> None:
    """Write values as JSON; a file is replaced whole.

    Args:
        plain: Plain values.
        file: Where to; "-" is standard output, None is nowhere.
    """
    if file is None:
        return
    text = json.dumps(plain, indent=2) + "\n"
    if file == STANDARD_OUTPUT:
        typer.echo(text, nl=False)
        return
    draft = file.with_name(f".{file.name}.part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


@contextmanager
def errors_in_one_line(*, traceback: bool) -> Iterator[None]:
    """Turn an error of ours into a line and an exit code: 2 for wrong settings, 1 for all else.

    Args:
        traceback: Let it pass instead, so that Python shows where it came from.

    Raises:
        typer.Exit: With the code.
        VlmpackError: If `traceback`.
        OSError: If `traceback`.
    """
    try:
        yield
    except (VlmpackError, OSError) as error:
        if traceback:
            raise
        message = Text.assemble(("error: ", "bold red"), plain_message(error))
        Console(stderr=True, highlight=False).print(message, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def plain_message(error: BaseException) -> str:
    """Return the error's own words, without the traceback that a DataLoader worker puts before them."""
    return _IN_WORKER.sub("", str(error)).strip() or type(error).__name__


def hush() -> None:
    """Switch off the libraries' own progress bars and notices: the command shows its own."""
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
