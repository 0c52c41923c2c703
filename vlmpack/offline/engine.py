"""Engines: the same plain function over many tasks, in processes of this machine or as Ray tasks.

Tasks are idempotent and finish files of their own, so an engine need not know what they do: a task whose
worker died is run again, in whatever order, and what comes back is the same.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vlmpack.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """What runs the tasks.

    Raises:
        ConfigError: If a number is out of its range.
    """

    name: Literal["pool", "ray"] = "pool"
    """A process pool, or Ray."""
    num_workers: int | None = None
    """Processes, or tasks at a time; None: a core each, all of a Ray cluster. 0 runs in this process."""
    address: str | None = None
    """Of a running Ray cluster; None starts Ray on this machine."""
    max_deaths: int = 3
    """How often a worker may die before the run gives up."""

    def __post_init__(self) -> None:
        if self.name not in {"pool", "ray"}:
            raise ConfigError(f'engine must be "pool" or "ray", got {self.name!r}')
        if (self.num_workers is not None and self.num_workers < 0) or self.max_deaths < 0:
            raise ConfigError(f"num_workers and max_deaths must be at least 0, got {self}")


def run_tasks(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], engine: Engine) -> Iterator[T]:
    """Yield what the function returns for each task, as tasks end; the order is not the tasks'.

    Args:
        function: A plain function of a module.
        tasks: Its arguments.
        engine: What runs them.

    Raises:
        SourceError: If workers die too often.
    """
    if not tasks:
        return
    if engine.name == "ray":
        yield from _ray(function, tasks, engine)
    elif engine.num_workers == 0 or len(tasks) == 1:
        for task in tasks:
            yield function(*task)
    else:
        yield from _pool(function, tasks, engine)


def _pool(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], engine: Engine) -> Iterator[T]:
    left = dict(enumerate(tasks))
    for death in range(engine.max_deaths + 1):
        try:
            for number, result in _pool_once(function, left, engine):
                del left[number]
                yield result
        except BrokenProcessPool as error:
            if death == engine.max_deaths:
                raise SourceError(
                    f"a worker process died {death + 1} times, with {len(left)} of {len(tasks)} tasks left: "
                    "is memory short? Use fewer workers; what is done stays done, the same command goes on"
                ) from error
        else:
            return


def _pool_once(
    function: Callable[..., T], left: dict[int, tuple[Any, ...]], engine: Engine
) -> Iterator[tuple[int, T]]:
    """Yield numbers and results until all are done or a worker dies.

    Only a few tasks wait in the pool: what is not begun is not lost with it.
    """
    workers = min(engine.num_workers or os.cpu_count() or 1, len(left))
    # Spawned, as torch's and the tokenizer's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Any, int] = {}
        try:
            for number, task in list(left.items()):
                running[pool.submit(function, *task)] = number
                if len(running) >= 2 * workers:
                    yield from _ended(running)
            while running:
                yield from _ended(running)
        finally:  # where the reader stops, or a task failed, the rest is not begun
            pool.shutdown(wait=False, cancel_futures=True)


def _ended(running: dict[Any, int]) -> Iterator[tuple[int, Any]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _ray(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], engine: Engine) -> Iterator[T]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("the engine ray needs Ray: pip install 'vlmpack[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(
            address=engine.address,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            **({} if engine.address else {"num_cpus": engine.num_workers or os.cpu_count()}),
        )
    try:
        remote = ray.remote(max_retries=engine.max_deaths, num_cpus=1)(function)
        most = engine.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting, running = iter(tasks), []
        for task in waiting:
            running.append(remote.remote(*task))
            if len(running) >= 2 * most:
                done, running = ray.wait(running)
                yield from ray.get(done)
        while running:
            done, running = ray.wait(running)
            yield from ray.get(done)
    except ray.exceptions.WorkerCrashedError as error:
        raise SourceError(f"a Ray worker died {engine.max_deaths + 1} times: {error}") from error
    finally:
        if ours:
            ray.shutdown()
