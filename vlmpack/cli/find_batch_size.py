"""`vlmpack find-batch-size`: the largest batch of a real model class, for each number of crops."""

import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from vlmpack.cli.console import check_folder, errors_in_one_line, results
from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmpack.batching.probe_models import ProbedModel
    from vlmpack.batching.search import BatchSizeSearch, SearchResult

GIB = 2**30


def find_batch_size(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option(help="A config.json or its folder; a tiny SmolVLM where not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", min=1, help="Upper limit.")] = 64,
    auto_adjust: Annotated[
        bool,
        typer.Option(
            "--auto-adjust-batch-size/--no-auto-adjust-batch-size",
            "--auto_adjust_batch_size/--no_auto_adjust_batch_size",
            help="Search, or try --batch-size alone.",
        ),
    ] = True,
    max_crops_list: Annotated[
        list[int] | None,
        typer.Option("--max-crops-list", "--max_crops_list", min=0, help="Crops of a sample: 12 13 14."),
    ] = None,
    start_from_max_crops: Annotated[
        int, typer.Option("--start-from-max-crops", "--start_from_max_crops", help="Leave out fewer crops.")
    ] = 0,
    method: Annotated[str, typer.Option(help="guided (reads peaks), or documented.")] = "guided",
    memory_limit: Annotated[
        float | None, typer.Option(min=0.0, help="GiB to use; off a GPU needed, and counted exactly.")
    ] = None,
    generate_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate; 0 trains instead.")] = 16,
    text_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a sample.")] = 64,
    max_attempts: Annotated[int | None, typer.Option(min=1, help="Tries for each number of crops.")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds after which a try is given up.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="File that keeps the tries, so that a killed search goes on.")
    ] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Find the largest batch size for each number of crops, on a real model class with random weights."""
    with errors_in_one_line(traceback=traceback):
        check_folder("--json", out)
        check_folder("--resume", resume)
        crops = _crops(max_crops_list, context.args, start_from_max_crops)
        rank = _join_ranks()
        options = _Options(
            cap=batch_size,
            method=method if auto_adjust else None,
            limit_bytes=_limit_bytes(memory_limit),
            generate_tokens=generate_tokens,
            text_tokens=text_tokens,
            max_attempts=max_attempts,
            timeout_s=timeout,
            store=resume,
            rank=rank,
        )
        try:
            found = _search(model, crops, options)
        finally:
            _leave_ranks()
        if rank == 0:
            _show(found, out)


class _Options(NamedTuple):
    """How to search."""

    cap: int
    method: str | None
    limit_bytes: float
    generate_tokens: int
    text_tokens: int
    max_attempts: int | None
    timeout_s: float | None
    store: Path | None
    rank: int


def _crops(listed: list[int] | None, rest: list[str], start: int) -> list[int]:
    """Return the numbers of crops: the words after the option, or the default ones.

    Raises:
        ConfigError: If a word is no number, or none is left.
    """
    from vlmpack.batching.experiment import DEFAULT_MAX_CROPS

    words = [word for word in rest if not word.isdigit()]
    if words or (rest and listed is None):
        raise ConfigError(f"not understood: {' '.join(words or rest)}; crops follow --max-crops-list")
    chosen = [*(listed or []), *(int(word) for word in rest)] or list(DEFAULT_MAX_CROPS)
    left = [crops for crops in chosen if crops >= start]
    if not left:
        raise ConfigError(f"no number of crops is left: {chosen} are all below {start}")
    return left


def _search(model: Path | None, crops: list[int], options: _Options) -> "list[SearchResult]":
    import torch

    from vlmpack.batching.experiment import BatchSizeExperiment
    from vlmpack.batching.model_probe import ModelProbe
    from vlmpack.batching.probe_models import load_probed_model

    torch.manual_seed(0)
    probed = load_probed_model(model, device="cuda" if torch.cuda.is_available() else "cpu")

    def probe_of(max_crops: int) -> ModelProbe:
        optimizer = None if options.generate_tokens else torch.optim.AdamW(probed.model.parameters())
        return ModelProbe(
            probed.model,
            probed.batches(max_crops, options.text_tokens),
            optimizer=optimizer,
            generate_tokens=options.generate_tokens,
            limit_bytes=options.limit_bytes,
        )

    def measure(max_crops: int, batch_size: int) -> dict[str, float]:
        return {"accuracy": _accuracy(probed, max_crops, options.text_tokens, batch_size)}

    log = _log(quiet=options.rank > 0)
    with _progress(log, len(crops), quiet=options.rank > 0):
        return BatchSizeExperiment(
            probe_of,
            base_batch_size=options.cap,
            search=_make_search(options, float(probe_of(crops[0]).static_bytes), log),
            measure=measure,
            log=log,
        ).run(crops)


@contextmanager
def _progress(log: logging.Logger, num_configurations: int, *, quiet: bool) -> "Iterator[None]":
    """Show on a terminal which configuration is at work and what it tries."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=results(aside=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("searching", total=num_configurations)

        class Follow(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                text = record.getMessage()
                bar.update(task, description=text.strip(), advance=text.startswith("Measuring"))

        follow = Follow()
        log.addHandler(follow)
        try:
            yield
        finally:
            log.removeHandler(follow)


def _make_search(options: _Options, static_bytes: float, log: logging.Logger) -> "BatchSizeSearch | None":
    """Return the search, or None where the size is fixed.

    Raises:
        ConfigError: If there is no such method.
    """
    from vlmpack.batching.search import BatchSizeSearch
    from vlmpack.batching.search_store import SearchStore

    if options.method is None:
        return None
    rule: dict[str, Any] = {} if options.max_attempts is None else {"max_attempts": options.max_attempts}
    store = None
    if options.store is not None:
        name = options.store.name if options.rank == 0 else f"{options.store.name}.rank{options.rank}"
        store = SearchStore(options.store.with_name(name))
    if options.method == "guided":
        rule |= {"limit_bytes": options.limit_bytes, "static_bytes": static_bytes}
    return BatchSizeSearch(
        options.method,  # type: ignore[arg-type]  # checked there
        timeout_s=options.timeout_s,
        store=store,
        log=log,
        **rule,
    )


def _limit_bytes(memory_limit: float | None) -> float:
    """Return what a batch may need.

    Raises:
        ConfigError: If nothing says so.
    """
    import torch

    if memory_limit:
        return memory_limit * GIB
    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU: say with --memory-limit how many GiB a batch may need")
    return 0.97 * float(torch.cuda.mem_get_info()[1])


def _accuracy(probed: "ProbedModel", max_crops: int, text_tokens: int, batch_size: int) -> float:
    """Return the share of next tokens that the model gets right on the batch that was tried."""
    import torch

    device = next(probed.model.parameters()).device
    batch = probed.batches(max_crops, text_tokens)(batch_size)
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    labels = inputs.pop("labels")[:, -text_tokens:]
    probed.model.eval()
    with torch.no_grad():
        logits = probed.model(**inputs).logits[:, -text_tokens - 1 : -1]
    return float((logits.argmax(-1) == labels[:, -logits.shape[1] :]).float().mean())


def _log(*, quiet: bool) -> logging.Logger:
    """Return the logger of the documented lines: INFO:__main__:..."""
    log = logging.getLogger("__main__")
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.handlers[0].setFormatter(logging.Formatter("%(levelname)s:%(name)s:%(message)s"))
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    return log


def _join_ranks() -> int:
    """Return this process's rank; under torchrun, join the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    import torch

    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return int(torch.distributed.get_rank())


def _leave_ranks() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _show(found: "list[SearchResult]", out: Path | None) -> None:
    from rich.table import Table

    from vlmpack.batching.search_store import write_results

    table = Table(title="Largest batch sizes", title_justify="left")
    for column in ("configuration", "estimate", "batch size", "tries", "of them OOM", "peak, GiB"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for each in found:
        peak = "" if each.peak_bytes is None else f"{each.peak_bytes / GIB:.3f}"
        row = (each.name, each.estimate, each.batch_size, len(each.trials), each.num_ooms, peak)
        table.add_row(*map(str, row))
    results().print(table)
    if out is not None:
        write_results(out, found)
