"""Streams of uneven length over ranks that are threads; over real process groups in test_processes.py."""

from __future__ import annotations

from threading import BrokenBarrierError

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.ranks_in_threads import run_ranks
from vlmpack.errors import ConfigError, EmptySourceError, SourceError
from vlmpack.ranks import EvenRanks, without_weight

VOCABULARY = 7


def batch(number: int, *, num_labels: int = 3, tiles: int = 0) -> dict:
    """Return a batch of four tokens that names its number."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(VOCABULARY, (1, 4), generator=generator)
    labels[:, num_labels:] = -100
    return {
        "features": torch.randn(1, 4, 5, generator=generator, dtype=torch.float64),
        "labels": labels,
        "tiles": torch.zeros(tiles, 3, 2, 2, dtype=torch.uint8),
        "keys": [(str(number),)],
    }


def even(exchange, loader, **options) -> EvenRanks:
    made = EvenRanks(loader, **options)
    made._exchange = exchange
    return made


def drawn(exchange, loader, **options) -> list:
    """Return (keys, tokens of all ranks, is empty) of each step."""
    ranks = even(exchange, loader, **options)
    return [(got["keys"], ranks.num_supervised, ranks.is_empty) for got in ranks]


def test_ranks_end_together_and_the_shorter_one_teaches_nothing():
    # Rank 0 has batches of 3 and 2 tokens, rank 1 one of 1 token: 4 tokens in step 0, 2 in step 1.
    loaders = [[batch(0, num_labels=3), batch(1, num_labels=2)], [batch(2, num_labels=1)]]
    outcomes, meeting = run_ranks(2, lambda exchange: drawn(exchange, loaders[exchange.rank]))
    assert outcomes[0] == [([("0",)], 4, False), ([("1",)], 2, False)]
    assert outcomes[1] == [([("2",)], 4, False), ([()], 2, True)]
    # One call a step, one more where a rank ran out, and one to find that all have.
    assert meeting.num_meetings == 4


def test_a_rank_without_any_batch_is_sent_one_to_copy():
    loaders = [[], [batch(0), batch(1)], []]
    outcomes, meeting = run_ranks(3, lambda exchange: drawn(exchange, loaders[exchange.rank]))
    assert [len(outcome) for outcome in outcomes] == [2, 2, 2]
    assert outcomes[0] == outcomes[2] == [([()], 3, True), ([()], 3, True)]
    # Steps 0 and 1: two calls each; the source and its batch once; and the end.
    assert meeting.num_meetings == 2 * 2 + 2 + 1


def test_ranks_that_all_have_nothing_end_at_once():
    outcomes, meeting = run_ranks(3, lambda exchange: drawn(exchange, []))
    assert outcomes == [[], [], []]
    assert meeting.num_meetings == 1


def test_a_part_without_rows_is_no_failure_unless_nobody_has_any():
    nothing = EmptySourceError("it yielded no row")
    loaders = [Failing([], nothing), [batch(0)]]
    outcomes, _ = run_ranks(2, lambda exchange: drawn(exchange, loaders[exchange.rank]))
    assert outcomes == [[([()], 3, True)], [([("0",)], 3, False)]]
    outcomes, _ = run_ranks(2, lambda exchange: drawn(exchange, Failing([], nothing)))
    assert outcomes == [nothing, nothing]


def test_a_template_or_a_maker_spares_the_copy():
    loaders = [[], [batch(0)]]
    for options in ({"template": batch(9)}, {"make_empty": lambda _: without_weight(batch(9))}):
        outcomes, meeting = run_ranks(2, lambda exchange: drawn(exchange, loaders[exchange.rank], **options))  # noqa: B023
        assert outcomes[0] == [([()], 3, True)]
        assert meeting.num_meetings == 3


def test_a_maker_gets_the_batch_to_copy_or_none():
    seen: list = []

    def make(example):
        seen.append(example and example["keys"])
        return without_weight(batch(9))

    loaders = [[batch(0)], [batch(1), batch(2)], []]
    run_ranks(3, lambda exchange: drawn(exchange, loaders[exchange.rank], make_empty=make))
    assert sorted(map(str, seen)) == ["None", "None", "[('0',)]"]


def test_an_empty_batch_has_images_if_a_batch_had():
    # The last batch of rank 0 has none, so the one before it is copied.
    loaders = [[batch(0, tiles=2), batch(1)], [batch(2), batch(3), batch(4)]]

    def tiles(exchange):
        return [len(got["tiles"]) for got in even(exchange, loaders[exchange.rank])]

    assert run_ranks(2, tiles)[0][0] == [2, 0, 2]


def test_the_batch_that_is_copied_stays_what_it_was_and_its_owner_may_change_it():
    original = batch(0)
    labels = original["labels"].clone()
    empty = without_weight(original)
    assert (empty["labels"] == -100).all()
    assert empty["labels"].shape == original["labels"].shape
    assert empty["features"] is original["features"]
    assert torch.equal(original["labels"], labels)
    assert original["keys"] == [("0",)]

    def consume(exchange):
        num_batches = 0
        for got in even(exchange, [[batch(1)], [batch(2), batch(3)]][exchange.rank]):
            got.pop("labels")
            num_batches += 1
        return num_batches

    assert run_ranks(2, consume)[0] == [2, 2]


class Failing:
    """A loader that raises behind its batches."""

    def __init__(self, batches, error):
        self._batches, self._error = batches, error

    def __iter__(self):
        if self._batches is None:
            raise self._error
        yield from self._batches
        raise self._error


@pytest.mark.parametrize("batches", [None, [], [batch(0)]], ids=["at iter", "first", "second"])
def test_a_failure_on_one_rank_is_raised_on_all(batches):
    error = OSError("disk gone")
    loaders = [[batch(1), batch(2)], Failing(batches, error), [batch(3)]]
    outcomes, _ = run_ranks(3, lambda exchange: drawn(exchange, loaders[exchange.rank]))
    assert outcomes[1] is error
    for other in (outcomes[0], outcomes[2]):
        assert isinstance(other, SourceError)
        assert f"rank 1 failed to make the batch of step {len(batches or [])}" in str(other)


def test_failures_of_several_ranks_are_counted():
    loaders = [[batch(1)], Failing([], OSError()), Failing([], OSError())]
    outcomes, _ = run_ranks(3, lambda exchange: drawn(exchange, loaders[exchange.rank]))
    assert "2 ranks failed" in str(outcomes[0])


def test_a_maker_that_fails_stops_all_ranks():
    def fail(_):
        raise ValueError("no idea")

    loaders = [[batch(0)], [batch(1), batch(2)]]
    outcomes, _ = run_ranks(2, lambda exchange: drawn(exchange, loaders[exchange.rank], make_empty=fail))
    assert isinstance(outcomes[0], ValueError)
    assert "rank 0 failed to make the batch of step 1" in str(outcomes[1])


@pytest.mark.parametrize("loader", [[torch.zeros(3)], [{"input_ids": torch.zeros(3)}]])
def test_a_batch_of_another_form_says_what_to_pass(loader):
    outcomes, _ = run_ranks(2, lambda exchange: drawn(exchange, [loader, []][exchange.rank]))
    assert isinstance(outcomes[0], ConfigError)
    assert "pass make_empty and count_labels" in str(outcomes[0])
    assert isinstance(outcomes[1], SourceError)


def test_batches_of_another_form_work_with_a_maker_and_a_count():
    def consume(exchange):
        loader = [[torch.ones(2)], [torch.ones(2), torch.ones(3)]][exchange.rank]
        ranks = even(exchange, loader, make_empty=torch.zeros_like, count_labels=len)
        return [(got.tolist(), ranks.num_supervised) for got in ranks]

    assert run_ranks(2, consume)[0] == [[([1, 1], 4), ([0, 0], 3)], [([1, 1], 4), ([1, 1, 1], 3)]]


def test_ranks_that_would_hang_are_seen_by_these_tests(monkeypatch):
    monkeypatch.setattr("tests.ranks_in_threads.TIMEOUT_S", 0.2)
    loaders = [[batch(0)], [batch(1), batch(2)]]

    def without_help(exchange):
        return [exchange.total([1]) for _ in loaders[exchange.rank]]

    outcomes, _ = run_ranks(2, without_help)
    assert outcomes[0] == [[2]]
    assert isinstance(outcomes[1], BrokenBarrierError)


def gradient(model, batches, scale):
    """Return the gradient of the sum of the token losses, times a scale, over some batches."""
    model.zero_grad()
    for got in batches:
        logits = model(got["features"]).flatten(0, 1)
        (F.cross_entropy(logits, got["labels"].flatten(), reduction="sum") * scale).backward()
    return model.weight.grad.clone()


@given(
    shards=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=4),
    with_template=st.booleans(),
)
def test_whatever_the_shards_nothing_is_lost_and_the_gradient_is_that_of_one_process(shards, with_template):
    # A shard is the number of labels of each of its batches.
    world_size = len(shards)
    number = iter(range(100))
    loaders = [[batch(next(number), num_labels=count) for count in shard] for shard in shards]
    torch.manual_seed(0)
    model = nn.Linear(5, VOCABULARY, bias=False, dtype=torch.float64)

    def train(exchange):
        ranks = even(exchange, loaders[exchange.rank], template=batch(99) if with_template else None)
        return [
            (got, ranks.loss_scale, ranks.num_supervised, ranks.is_empty) for got in ranks
        ], ranks.num_empty

    outcomes, _ = run_ranks(world_size, train)
    steps = list(zip(*(steps for steps, _ in outcomes), strict=True))
    assert len(steps) == max(map(len, shards))
    assert [num_empty for _, num_empty in outcomes] == [len(steps) - len(shard) for shard in shards]
    for number, step in enumerate(steps):
        real = [loader[number] for loader in loaders if number < len(loader)]
        assert [got["keys"] for got, *_, is_empty in step if not is_empty] == [one["keys"] for one in real]
        tokens = sum(int((one["labels"] != -100).sum()) for one in real)
        assert {num_supervised for *_, num_supervised, _ in step} == {tokens}
        # What DDP does: the mean over ranks of each rank's gradient.
        mean = sum(gradient(model, [got], scale) for got, scale, *_ in step) / world_size
        assert torch.allclose(mean, gradient(model, real, 1 / max(tokens, 1)), atol=1e-12)


def test_one_process_needs_no_others():
    ranks = EvenRanks([batch(0), batch(1, num_labels=2)])
    assert [(got["keys"], ranks.num_supervised, ranks.loss_scale) for got in ranks] == [
        ([("0",)], 3, 1 / 3),
        ([("1",)], 2, 1 / 2),
    ]


def test_ranks_that_do_not_know_each_other_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but the ranks do not know each other yet"):
        next(iter(EvenRanks([batch(0)])))


class Resumable(list):
    """A loader that counts what it handed out."""

    num_had = 0

    def __iter__(self):
        for got in self[self.num_had :]:
            self.num_had += 1
            yield got

    def state_dict(self):
        return {"num_had": self.num_had}

    def load_state_dict(self, state):
        self.num_had = state["num_had"]


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_stream_goes_on_where_it_stood_also_where_a_rank_was_through(stop):
    shards = [[batch(0), batch(1), batch(2)], [batch(3)]]

    def consume(exchange):
        ranks = even(exchange, Resumable(shards[exchange.rank]))
        batches = iter(ranks)
        first = [next(batches)["keys"] for _ in range(stop)]
        again = even(exchange, Resumable(shards[exchange.rank]))
        again.load_state_dict(ranks.state_dict())
        return first + [got["keys"] for got in again]

    outcomes, _ = run_ranks(2, consume)
    assert outcomes == [[[("0",)], [("1",)], [("2",)]], [[("3",)], [()], [()]]]


def test_states_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="list has no state"):
        EvenRanks([batch(0)]).state_dict()
    with pytest.raises(ConfigError, match="shared by 4 ranks, now there are 1"):
        EvenRanks(Resumable()).load_state_dict({"world_size": 4, "loader": {}})
    with pytest.raises(ConfigError, match="this is no state of EvenRanks: it has num_had"):
        EvenRanks(Resumable()).load_state_dict({"num_had": 1})
