"""What the commands say: results on standard output, all else on standard error, errors in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from vlmpack.errors import ConfigError, VlmpackError

_IN_WORKER = re.compile(r"\ACaught \w+ in DataLoader worker process.*\n[\w.]*Error: ", re.DOTALL)


def results(*, aside: bool = False) -> Console:
    """Return the console for results.

    Args:
        aside: Use standard error, because standard output carries something for machines.
    """
    return Console(stderr=aside, highlight=False)


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
