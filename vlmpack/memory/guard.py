"""Refuse a batch before it is built, and say what makes it too large."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vlmpack.errors import BudgetError, ConfigError
from vlmpack.memory.estimate import estimate
from vlmpack.memory.fit_rule import DEFAULT_MARGIN, FitRule, Verdict, gib
from vlmpack.memory.model_shape import ModelShape
from vlmpack.memory.regime import PACKED_REGIME, TrainingRegime
from vlmpack.memory.remedies import remedies

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from vlmpack.budget import BatchBudget, PackBudget, SampleCost
    from vlmpack.geometry import Tiling
    from vlmpack.memory.gpus import Gpu

NAMED: Final = 3
"""Samples and remedies that a refusal names."""


class BatchGuard:
    """Knows what batches a GPU takes; a question costs well under a millisecond.

    Give one guard to the packer, which derives its budget from it, and to the collator, which refuses what
    is over all the same.

    Args:
        model: The model's sizes, a preset's name, or a local transformers config.
        regime: How it is trained; None: with packed rows, and otherwise as the reference pipeline does.
        gpu: A name out of `GPUS`, or the device's bytes.
        margin: Share of the peak that is left free.
        replay: Let a batch pass, too, that the rule refuses and a replay of the allocator takes; the first
            question of a number and length of rows then takes about a second.
    """

    def __init__(
        self,
        model: ModelShape | str | PathLike[str],
        regime: TrainingRegime | None,
        gpu: Gpu | str | int,
        *,
        margin: float = DEFAULT_MARGIN,
        replay: bool = False,
    ) -> None:
        self.model = ModelShape.of(model)
        self._rule = FitRule.of(
            self.model, regime or PACKED_REGIME, gpu, tokens_per_row=1, margin=margin, replay=replay
        )

    @property
    def regime(self) -> TrainingRegime:
        """How the model is trained, with this GPU's workspaces."""
        return self._rule.regime

    @property
    def gpu(self) -> Gpu:
        """The device."""
        return self._rule.gpu

    def pack_budget(
        self,
        *,
        rows: int,
        tokens_per_row: int,
        max_images: int | None = None,
        tiling: Tiling | None = None,
        bounded: bool = True,
    ) -> PackBudget:
        """Return what each of `rows` packs may hold so that no batch of them is refused.

        A batch that does not fit even without a picture raises ConfigError, which says what is missing.

        Args:
            rows: Packs of the batch.
            tokens_per_row: Positions of each, padding included.
            max_images: Images of a pack, for the caller's own reasons.
            tiling: The rule by which images become tiles; checked against the model.
            bounded: Every tile has the model's number of tokens, so tokens bound the tiles too.
        """
        rule = replace(self._rule_for(tokens_per_row, tiling), bounded=bounded)
        return rule.pack_budget(rows, max_images)

    def batch_budget(
        self, *, tokens_per_row: int, rows: int | None = None, tiling: Tiling | None = None
    ) -> BatchBudget:
        """Return the largest batch that is not refused.

        Args:
            tokens_per_row: Positions of each pack, padding included.
            rows: Packs of the batch; None: as many as may all be full of tiles.
            tiling: The rule by which images become tiles; checked against the model.
        """
        return self._rule_for(tokens_per_row, tiling).batch_budget(rows)

    def _rule_for(self, tokens_per_row: int, tiling: Tiling | None) -> FitRule:
        rule = self._rule.for_rows_of(tokens_per_row)
        if tiling is None:
            return rule
        self._check_tiling(tiling)
        return replace(rule, position_tokens=tiling.position_tokens)

    def _check_tiling(self, tiling: Tiling) -> None:
        """Compare how images are cut with what the model takes.

        Raises:
            ConfigError: If the model's encoder takes tiles of one size and the images are cut to another.
        """
        vision = self.model.vision
        if vision is None or vision.rotary:  # without a picture, or of any size
            return
        for what, cut, takes in (
            ("tiles of {} pixels", tiling.tile_size, vision.tile_size),
            ("patches of {} pixels", tiling.patch_size, vision.patch_size),
            ("{} image tokens a tile", tiling.tokens_per_tile, self.model.tokens_per_tile),
        ):
            if cut != takes:
                raise ConfigError(
                    f"images are cut into {what.format(cut)}, but {self.model.name} takes "
                    f"{what.format(takes)}: the memory model and the packer would count different things"
                )

    def verdict(self, *, rows: int, tokens_per_row: int, patches: int) -> Verdict:
        """Return whether a batch fits.

        Args:
            rows: Packs of the batch.
            tokens_per_row: Positions of each, padding included.
            patches: ViT patches of the whole batch.
        """
        return self._rule.for_rows_of(tokens_per_row).verdict(rows, self._tiles(patches))

    def admit(
        self,
        *,
        rows: int,
        tokens_per_row: int,
        patches: int,
        samples: Mapping[str, SampleCost] | None = None,
    ) -> None:
        """Let a batch pass, or refuse it.

        Args:
            rows: Packs of the batch.
            tokens_per_row: Positions of each, padding included.
            patches: ViT patches of the whole batch.
            samples: Cost of each sample by its key, to name the dearest ones.

        Raises:
            BudgetError: If the model says that it does not fit; names bytes by component, the dearest
                samples and what would help.
        """
        verdict = self.verdict(rows=rows, tokens_per_row=tokens_per_row, patches=patches)
        if not verdict.fits:
            raise BudgetError(self._refusal(verdict, rows, tokens_per_row, patches, samples or {}))

    def _tiles(self, patches: int) -> float:
        each = self.model.patches_per_tile
        if not each:
            return float(patches > 0)
        whole, rest = divmod(patches, each)
        return whole + rest / each if rest else whole

    def _refusal(
        self,
        verdict: Verdict,
        rows: int,
        tokens: int,
        patches: int,
        samples: Mapping[str, SampleCost],
    ) -> str:
        tiles = self._tiles(patches)
        step = estimate(self.model, self.regime, rows=rows, tokens_per_row=tokens, tiles=tiles)
        parts = sorted(step.peak.parts.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {gib(size)}" for name, size in parts if size > 0.005 * step.peak.total)
        lines = [
            f"a batch of {rows} pack(s) of {tokens:,} tokens with {patches:,} patches needs "
            f"{gib(verdict.required_bytes)}, but {self.gpu.name} has {gib(verdict.available_bytes)}: "
            f"{gib(verdict.short_bytes)} too much.",
            f"At its peak ({step.peak.name}): {listed}.",
        ]
        dearest = sorted(samples.items(), key=lambda item: (-item[1].num_patches, -item[1].num_tokens))
        if dearest:
            named = ", ".join(
                f"{key} ({cost.num_patches:,} patches, {cost.num_tokens:,} tokens)"
                for key, cost in dearest[:NAMED]
            )
            lines.append(f"Dearest samples: {named}.")
        found = remedies(self.model, self.regime, self.gpu, rows=rows, tokens_per_row=tokens, tiles=tiles)
        # what fits comes first, and among those what saves least is the smallest change
        helpful = [remedy for remedy in found if remedy.fits][-NAMED:] or list(found[:NAMED])
        if helpful:
            named = "; ".join(
                f"{remedy.name} saves {gib(remedy.saved_bytes)}{' and fits' if remedy.fits else ''}"
                for remedy in helpful
            )
            lines.append(f"What helps: {named}.")
        return " ".join(lines)
