"""EvenRanks: the batches of a stream such that no rank ends before another, and nothing is lost.

              step 0     step 1     step 2     step 3
    rank 0    batch      batch      batch      end
    rank 1    batch      (empty)    (empty)    end       its shard was shorter
    tokens    310        150        170                  with a label, of both: what the loss is divided by

Before each step the ranks add up a few integers: who has a batch, how many tokens have a label, whether
somebody failed. A rank that ran out gets a batch without labels: its loss is 0, and it takes part in whatever
the ranks do together. That needs no hooks, so it works with DDP and FSDP alike; what it costs is the work of
the empty batches. Stopping with the shortest rank instead lost 10 % of the samples of an uneven stream.

Where the data set has a length, `PackLoader` is even without any of this.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from vlmpack.errors import ConfigError, EmptySourceError, SourceError
from vlmpack.ranks.exchange import connect
from vlmpack.stages.placeholders import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch.distributed as dist

    from vlmpack.ranks.exchange import Exchange

B = TypeVar("B")

_PIXELS = ("tiles", "pixel_values")
"""Keys under which a batch has its images."""


def without_weight(batch: B) -> B:
    """Return a batch of the same shapes that teaches nothing: its labels are -100. Its images stay.

    A model with a vision tower so has gradients (zeros) for all parameters on every rank, which DDP needs.

    Args:
        batch: A mapping with `labels`; it is left as it is.

    Raises:
        ConfigError: If it is none.
    """
    empty: Any = copy.copy(batch)
    empty["labels"] = torch.full_like(_labels(batch), IGNORE_INDEX)
    for name in ("loss_weights", "loss_weight_sum"):
        if name in empty:
            empty[name] = torch.zeros_like(empty[name])
    if "keys" in empty:
        empty["keys"] = [() for _ in empty["keys"]]
    return empty  # type: ignore[no-any-return]


def num_labels(batch: object) -> int:
    """Return the tokens of a batch that have a label.

    Args:
        batch: A mapping with `labels`, as a collator makes it.

    Raises:
        ConfigError: If it is none.
    """
    return int((_labels(batch) != IGNORE_INDEX).sum())


def _labels(batch: object) -> torch.Tensor:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), torch.Tensor):
        raise ConfigError(
            f"a batch must be a mapping with a tensor of labels, got {type(batch).__name__}; pass make_empty "
            "and count_labels for batches of another form"
        )
    labels: torch.Tensor = batch["labels"]
    return labels


@dataclass(frozen=True, slots=True)
class _Turn(Generic[B]):
    """What a rank brings to a step."""

    batch: B | None = None
    num_supervised: int = 0
    error: Exception | None = None
    """What went wrong: all ranks stop."""
    emptiness: EmptySourceError | None = None
    """Why this rank has no batch from the start: its part may have no row, as long as another one has."""


class EvenRanks(Generic[B]):
    """Iterates over a loader on every rank until the last rank's loader ends.

    Divide the *sum* of the token losses by all ranks' tokens, or multiply it by `loss_scale`, which also
    undoes the mean that DDP and FSDP take over ranks. Then the gradient is that of one process with all
    batches of the step. A mean over the batch's own tokens would be 0 / 0 on an empty batch.

    A failure of the loader on one rank is raised on all of them, at the same step.

    Args:
        loader: Batches of this rank's part of the stream.
        make_empty: Makes a batch without weight from one that some rank had. By default it has the same
            shapes and images, and no labels. It is called with None where no batch is known.
        template: A batch to make empty ones from, for ranks that may get none; without, a rank that has had
            none is sent one by a rank that has.
        count_labels: Returns the tokens of a batch that have a label. By default, `labels` that are not -100.
        group: Ranks that share the stream; all where None. Best one with gloo, which does not hold up the
            device.

    Raises:
        ConfigError: When iterated, if a batch has no labels and nothing says how to make it empty.
        SourceError: When iterated, if another rank failed, or no rank has any row.
    """

    def __init__(
        self,
        loader: Iterable[B],
        *,
        make_empty: Callable[[B | None], B] | None = None,
        template: B | None = None,
        count_labels: Callable[[B], int] = num_labels,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._loader = loader
        self._make_empty = make_empty
        self._template = template
        self._count_labels = count_labels
        self._group = group
        self._exchange: Exchange | None = None
        self.num_supervised = 0
        """Tokens with a label in this step, over all ranks."""
        self.is_empty = False
        """Whether this rank's batch is one without weight."""
        self.num_empty = 0
        """Empty batches that this rank had in this pass."""

    @property
    def loss_scale(self) -> float:
        """Ranks / tokens with a label in this step: multiply the sum of the token losses by it."""
        return self._connected().world_size / max(self.num_supervised, 1)

    def __iter__(self) -> Iterator[B]:
        exchange = self._connected()
        self.num_empty = 0
        batches = _begun_late(self._loader)
        for step in count():
            turn = self._draw(batches)
            lacks_template = turn.batch is None and self._template is None and self._make_empty is None
            num_ready, num_lacking, self.num_supervised = _agree(exchange, turn, step, lacks_template)
            if not num_ready:
                if turn.emptiness is not None and step == 0:
                    raise turn.emptiness
                return
            self.is_empty = turn.batch is None
            if num_lacking:
                self._share_template(exchange, turn.batch)
            if num_ready < exchange.world_size:
                turn = self._fill(turn)
                _agree(exchange, turn, step)
            self.num_empty += self.is_empty
            assert turn.batch is not None
            yield turn.batch

    def state_dict(self) -> dict[str, Any]:
        """Return where this rank's loader stands; every rank keeps its own.

        Raises:
            ConfigError: If the loader has no state.
        """
        return {"world_size": self._connected().world_size, "loader": self._stateful().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same rank.

        Args:
            state: From `state_dict`.

        Raises:
            ConfigError: If the loader has no state, or the state is of another number of ranks or of
                something else.
        """
        if not {"world_size", "loader"} <= state.keys():
            raise ConfigError(
                f"this is no state of EvenRanks: it has {', '.join(sorted(state)) or 'nothing'}"
            )
        world_size = self._connected().world_size
        if state["world_size"] != world_size:
            raise ConfigError(
                f"the saved stream was shared by {state['world_size']} ranks, now there are {world_size}: a "
                "rank's place in its part means nothing then. Use as many ranks, or index mode"
            )
        self._stateful().load_state_dict(state["loader"])

    def _draw(self, batches: Iterator[B]) -> _Turn[B]:
        """Return this rank's next batch and its tokens, nothing at the end, or what went wrong."""
        try:
            batch = next(batches, None)
            if batch is None:
                return _Turn()
            num_supervised = self._count_labels(batch)
        except EmptySourceError as emptiness:
            return _Turn(emptiness=emptiness)
        except Exception as error:  # the others are told, and then it is raised
            return _Turn(error=error)
        if self._template is None or _has_images(batch) or not _has_images(self._template):
            self._template = copy.copy(batch)  # the caller may empty its own
        return _Turn(batch=batch, num_supervised=num_supervised)

    def _fill(self, turn: _Turn[B]) -> _Turn[B]:
        """Return the turn with a batch, an empty one where there is none, or what went wrong."""
        if turn.batch is not None:
            return turn
        try:
            if self._make_empty is not None:
                return _Turn(batch=self._make_empty(self._template))
            assert self._template is not None
            return _Turn(batch=without_weight(self._template))
        except Exception as error:  # the others are told, and then it is raised
            return _Turn(error=error)

    def _share_template(self, exchange: Exchange, batch: B | None) -> None:
        """Send a batch from the first rank that has one to those that never had any."""
        source = exchange.lowest(exchange.world_size if batch is None else exchange.rank)
        sent = _on_cpu(batch) if exchange.rank == source else None
        received = exchange.copy_of(sent, source)
        if self._template is None:
            self._template = received

    def _connected(self) -> Exchange:
        if self._exchange is None:
            self._exchange = connect(self._group)
        return self._exchange

    @property
    def has_state(self) -> bool:
        """Whether the loader has a state that can be saved."""
        return hasattr(self._loader, "state_dict") and hasattr(self._loader, "load_state_dict")

    def _stateful(self) -> Any:
        if not self.has_state:
            raise ConfigError(
                f"{type(self._loader).__name__} has no state; a torchdata StatefulDataLoader has one"
            )
        return self._loader


def _begun_late(loader: Iterable[B]) -> Iterator[B]:
    """Iterate such that what fails at the very start fails at the first batch, where the others are told."""
    yield from loader


def _agree(
    exchange: Exchange, turn: _Turn[B], step: int, lacks_template: bool = False
) -> tuple[int, int, int]:
    """Return the ranks with a batch, those that cannot make an empty one, and the tokens of all.

    Raises:
        SourceError: If another rank failed; on the rank that failed, its own error.
    """
    has_failed = turn.error is not None
    num_ready, num_lacking, num_supervised, num_failed, failed = exchange.total([
        turn.batch is not None,
        lacks_template,
        turn.num_supervised,
        has_failed,
        exchange.rank if has_failed else 0,
    ])
    if turn.error is not None:
        raise turn.error
    if num_failed:
        who = f"rank {failed}" if num_failed == 1 else f"{num_failed} ranks"
        raise SourceError(
            f"{who} failed to make the batch of step {step}, and so all ranks stop; its own output says why"
        )
    return num_ready, num_lacking, num_supervised


def _has_images(batch: object) -> bool:
    if not isinstance(batch, Mapping):
        return False
    return any(isinstance(batch.get(key), torch.Tensor) and batch[key].numel() for key in _PIXELS)


def _on_cpu(batch: B) -> B:
    """Return the batch with its tensors where every rank can have them."""
    if not isinstance(batch, Mapping):
        return batch
    moved: Any = copy.copy(batch)
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            moved[key] = value.cpu()
    return moved  # type: ignore[no-any-return]
