"""Refuse a batch before it is built, and say what makes it too large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vlmpack.errors import BudgetError
from vlmpack.memory.estimate import estimate
from vlmpack.memory.fit_rule import DEFAULT_MARGIN, FitRule, Verdict, gib
from vlmpack.memory.remedies import remedies

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmpack.budget import SampleCost
    from vlmpack.memory.gpus import Gpu
    from vlmpack.memory.model_shape import ModelShape
    from vlmpack.memory.regime import TrainingRegime

NAMED: Final = 3
"""Samples and remedies that a refusal names."""


class BatchGuard:
    """Knows what batches a GPU takes; a question costs well under a millisecond.

    Args:
        model: The model's sizes.
        regime: How it is trained.
        gpu: A name out of `GPUS`, or the device's bytes.
        margin: Share of the peak that is left free.
    """

    def __init__(
        self,
        model: ModelShape,
        regime: TrainingRegime,
        gpu: Gpu | str | int,
        *,
        margin: float = DEFAULT_MARGIN,
    ) -> None:
        self.model = model
        self._rule = FitRule.of(model, regime, gpu, tokens_per_row=1, margin=margin)

    @property
    def regime(self) -> TrainingRegime:
        """How the model is trained, with this GPU's workspaces."""
        return self._rule.regime

    @property
    def gpu(self) -> Gpu:
        """The device."""
        return self._rule.gpu

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
