"""Loss weights: equal to their definition sample by sample, and blind to how a step is split."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from vlmpack.errors import ConfigError
from vlmpack.weighting import loss_weights, step_weight_sum, supervised, weighted_loss

VOCABULARY = 7
RULES = ("token", "sample", "sqrt")
SCALE = {"token": lambda n: 1.0, "sample": lambda n: 1 / n, "sqrt": lambda n: 1 / math.sqrt(n)}
"""The definition: what each of n supervised tokens of a sample counts."""


@st.composite
def packs(draw):
    """Draw rows of samples; a sample is (ids, labels), its first label masked or not, none learnt or all."""
    num_rows = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        lengths = draw(st.lists(st.integers(1, 6), min_size=0, max_size=3))
        rows.append([])
        for length in lengths:
            ids = torch.randint(VOCABULARY, (length,), generator=generator)
            learnt = torch.rand(length, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))
            rows[-1].append((ids, torch.where(learnt, ids, -100)))
    return rows


def collate(rows, length=20):
    """Lay samples out in rows, with one padding position behind each, as packs have."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    segments = torch.zeros_like(ids)
    for row, samples in enumerate(rows):
        start = 0
        for segment, (sample_ids, sample_labels) in enumerate(samples, start=1):
            stop = start + len(sample_ids)
            ids[row, start:stop], labels[row, start:stop] = sample_ids, sample_labels
            segments[row, start:stop] = segment
            start = stop + segment % 2  # with padding behind every other sample only
    return ids, labels, segments


class Model(torch.nn.Module):
    """Float64; mixes along the positions of a row, so that a loss depends on more than its own token."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = torch.nn.Parameter(torch.randn(VOCABULARY, 5, generator=generator, dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.randn(5, VOCABULARY, generator=generator, dtype=torch.float64))

    def forward(self, ids, segments):
        hidden = self.embed[ids]
        same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
        mixed = (same.tril().double() @ hidden).tanh()
        return mixed @ self.head

    def gradient(self):
        return torch.cat([weight.grad.flatten() for weight in self.parameters()])


def gradient_of(batches, rule):
    """Return loss and gradient of a step given as micro-batches, be they of one rank or of several."""
    model = Model()
    parts = []
    for rows in batches:
        ids, labels, segments = collate(rows)
        parts.append((ids, labels, segments, loss_weights(labels, segments, rule, dtype=torch.float64)))
    weight_sum = step_weight_sum(part[-1].sum() for part in parts)
    total = 0.0
    for ids, labels, segments, weights in parts:
        loss = weighted_loss(model(ids, segments), labels, weights, weight_sum)
        loss.backward()
        total += float(loss.detach())
    return total, model.gradient()


def definition(rows, rule):
    """Return loss and gradient from the definition, one sample at a time, one token at a time."""
    model = Model()
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for ids, labels in (sample for samples in rows for sample in samples):
        logits = model(ids[None], torch.ones_like(ids)[None])[0]
        losses = [
            -torch.log_softmax(logits[at - 1], dim=0)[labels[at]]
            for at in range(1, len(ids))
            if labels[at] != -100
        ]
        for loss in losses:
            numerator = numerator + SCALE[rule](len(losses)) * loss
            denominator += SCALE[rule](len(losses))
    loss = numerator / denominator if denominator else numerator + 0 * model.embed.sum()
    (loss + 0 * (model.embed.sum() + model.head.sum())).backward()
    return float(loss.detach()), model.gradient()


@pytest.mark.parametrize("rule", RULES)
@given(rows=packs())
def test_the_loss_of_packs_is_its_definition_sample_by_sample(rule, rows):
    loss, gradient = gradient_of([rows], rule)
    expected, expected_gradient = definition(rows, rule)
    assert abs(loss - expected) < 1e-12
    assert float((gradient - expected_gradient).abs().max()) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@given(rows=packs(), data=st.data())
def test_no_split_into_micro_batches_or_ranks_changes_the_gradient(rule, rows, data):
    whole, whole_gradient = gradient_of([rows], rule)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    batches = [rows[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    loss, gradient = gradient_of(batches, rule)
    assert abs(loss - whole) < 1e-12
    assert float((gradient - whole_gradient).abs().max()) < 1e-12


def test_weights_worked_out_by_hand():
    """Row 0: a sample of 3 learnt tokens (its first label does not count), one of 1. Row 1: one of 4."""
    labels = torch.tensor([[5, 5, 5, 5, -100, 5, -100], [-100, 5, 5, 5, 5, -100, -100]])
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0]])
    third, root = 1 / 3, 1 / math.sqrt(3)
    for rule, expected in {
        "token": [[0, 1, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 0, 0]],
        "sample": [[0, third, third, third, 0, 1, 0], [0, 0.25, 0.25, 0.25, 0.25, 0, 0]],
        "sqrt": [[0, root, root, root, 0, 1, 0], [0, 0.5, 0.5, 0.5, 0.5, 0, 0]],
    }.items():
        weights = loss_weights(labels, segments, rule, dtype=torch.float64)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert float(loss_weights(labels, segments, "sample").sum()) == pytest.approx(3)  # samples
    assert float(loss_weights(labels, segments, "token").sum()) == 8  # tokens


def test_a_label_across_a_seam_is_never_learnt():
    labels = torch.tensor([[5, 5, 5, 5]])
    segments = torch.tensor([[1, 1, 2, 2]])
    assert supervised(labels, segments).tolist() == [[False, True, False, True]]


def test_a_mean_of_means_would_be_another_gradient():
    """The guard: what a trainer does without the sum of weights of the whole step."""
    long = (torch.arange(6), torch.arange(6))
    short = (torch.arange(2), torch.tensor([-100, 1]))
    _, whole = gradient_of([[[long], [short]]], "token")
    means = (gradient_of([[[long]]], "token")[1] + gradient_of([[[short]]], "token")[1]) / 2
    assert float((means - whole).abs().max()) > 1e-2


def test_a_step_without_a_learnt_token_gives_a_loss_and_a_gradient_of_zero():
    loss, gradient = gradient_of([[[(torch.arange(3), torch.full((3,), -100))]]], "sample")
    assert loss == 0
    assert not gradient.any()


def test_the_loss_keeps_float64_and_lifts_bfloat16():
    logits = torch.randn(1, 4, VOCABULARY, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, 3]])
    weights = loss_weights(labels, torch.ones_like(labels))
    assert weighted_loss(logits, labels, weights, 3.0).dtype == torch.float64
    assert weighted_loss(logits.bfloat16(), labels, weights, 3.0).dtype == torch.float32


def test_label_smoothing_is_that_of_transformers():
    from transformers.modeling_outputs import CausalLMOutput
    from transformers.trainer_pt_utils import LabelSmoother

    logits = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 1, 2, -100, 3], [-100, -100, 4, 5, 6]])
    weights = loss_weights(labels, torch.ones_like(labels))
    ours = weighted_loss(logits, labels, weights, weights.sum(), label_smoothing=0.1)
    theirs = LabelSmoother(epsilon=0.1)(CausalLMOutput(logits=logits), labels.clone(), shift_labels=True)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("labels", "segments", "rule", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(1, 3), "mean", "must be one of"),
        (torch.zeros(1, 3), torch.zeros(1, 4), "token", r"\[1, 3\].*\[1, 4\]"),
        (torch.zeros(3), torch.zeros(3), "token", r"must both be \[packs, positions\]"),
    ],
)
def test_wrong_input_is_refused(labels, segments, rule, message):
    with pytest.raises(ConfigError, match=message):
        loss_weights(labels.long(), segments.long(), rule)
