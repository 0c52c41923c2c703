"""The contract of `tests.conformance` on every stage of the pipeline."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.conformance import StageContract, same
from tests.fakes import SMALL, drop_in_tokenizer, jpeg, png, row, samples_of, tokenizer
from vlmpack.budget import PackBudget
from vlmpack.corpus import CHATML
from vlmpack.errors import SampleError
from vlmpack.images import MAX_PIXELS
from vlmpack.integrations import nanovlm
from vlmpack.packing import Assembler, ConstantLengthDataset
from vlmpack.samples import Refusal, Sample
from vlmpack.stages import Admission, RowParser, RowSource, VQADataset
from vlmpack.stages.prefetch import map_ahead


class TestRowSource(StageContract):
    drops_broken = False

    def make(self, inputs):
        return RowSource(inputs)

    def run(self, stage, inputs):
        return list(stage)

    def keys_of(self, outcome):
        return [outcome[0]]


class TestRowParser(StageContract):
    def make(self, inputs):
        return RowParser()

    def run(self, stage, inputs):
        outcomes = []
        for number, raw in enumerate(inputs):
            try:
                outcomes.append(stage(str(number), raw))
            except SampleError as error:
                outcomes.append(Refusal.of(str(number), error))
        return outcomes


class TestVQADataset(StageContract):
    def make(self, inputs):
        return VQADataset(inputs, tokenizer(), tiling=SMALL)

    def run(self, stage, inputs):
        return list(stage)


class SampleInputs:
    """Stages behind `VQADataset` take samples, some with images whose bodies are broken."""

    def inputs(self):
        body = jpeg(64, 64)[:900]
        rows = [row(f"q{i} " * (i + 1), images=[png(20 + 9 * i, 40)] * (i % 4)) for i in range(12)]
        rows += [row(images=[body]), row(images=[png(9, 9), body])]
        return [item for item in samples_of(rows) if isinstance(item, Sample)]


class TestAdmission(SampleInputs, StageContract):
    def make(self, inputs):
        return Admission(budget=PackBudget(max_tokens=60, max_images=2, max_patches=40), extra_tokens=1)

    def run(self, stage, inputs):
        return [stage(sample) for sample in inputs]


class TestAdmissionWithFewerTiles(TestAdmission):
    def make(self, inputs):
        return Admission(
            budget=PackBudget(max_tokens=60, max_images=2, max_patches=40),
            oversize="fewer_tiles",
            tiling=SMALL,
            retile=samples_of([]).retile,
        )


class TestAssembler(SampleInputs, StageContract):
    def make(self, inputs):
        return Assembler(budget=None, tile_size=32, pad_token_id=0, append_pad=True, max_pixels=MAX_PIXELS)

    def run(self, stage, inputs):
        outcomes = []
        for start in range(0, len(inputs), 3):
            pack, refusals = stage(inputs[start : start + 3])
            outcomes += [*refusals, *([] if pack is None else [pack])]
        return outcomes


class TestAssemblerAhead(TestAssembler):
    """The same through `map_ahead`."""

    def run(self, stage, inputs):
        groups = [inputs[start : start + 2] for start in range(0, len(inputs), 2)]
        outcomes = []
        for pack, refusals in map_ahead(stage, groups, num_threads=2, ahead=3):
            outcomes += [*refusals, *([] if pack is None else [pack])]
        return outcomes


class TestConstantLengthDataset(StageContract):
    def make(self, inputs):
        return ConstantLengthDataset(samples_of(inputs), seq_length=400)

    def run(self, stage, inputs):
        return [*stage, *stage.report.refusals]


class TestDropInVQADataset(StageContract):
    """Items have no key: the position is it."""

    def make(self, inputs):
        return nanovlm.VQADataset(inputs, drop_in_tokenizer(CHATML), nanovlm.get_image_processor(128, 32), 4)

    def run(self, stage, inputs):
        return [(str(index), stage[index]) for index in range(len(stage))]

    def keys_of(self, outcome):
        return [outcome[0]]

    drops_broken = False  # by None


def test_the_contract_tells_values_apart():
    """A guard: `same` must not say yes to everything."""
    first, second = samples_of([row("a", images=[png(9, 9)]), row("b", images=[png(9, 9)])])
    assert same(first, first)
    assert not same(first, second)
    assert not same(first, replace(first, labels=first.labels + 1))
    assert not same([first], [first, first])
    assert not same({"a": torch.zeros(2)}, {"a": torch.ones(2)})
    assert not same(1, True)
