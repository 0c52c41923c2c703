"""nanoVLM, the reference pipeline's own model: a `Tiling`, the whole picture FIRST, each tile with its tag.

    <|global_image|>[<|image|> x 64]<row_1_col_1>[<|image|> x 64]<row_1_col_2>...

Its language model makes its positions itself and takes a padding mask at most, so nothing in a batch could
isolate samples. `prepare` gives its attention layers a segment mask: rotary positions are relative, so a mask
alone makes a sample what it is alone. An unprepared model does not know the batch's `segment_ids`: it raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from vlmpack.errors import ConfigError
from vlmpack.families.family import Family
from vlmpack.families.settings import integer
from vlmpack.geometry import ImageGeometry, Tiling
from vlmpack.images import tile_image
from vlmpack.stages.placeholders import GLOBAL_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN, position_token

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

    from vlmpack.families.family import Settings
    from vlmpack.families.rows import Rows
    from vlmpack.families.tokens import Pieces

_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj", "n_heads", "n_kv_heads", "head_dim", "resid_dropout")


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoVLM(Family):
    """nanoVLM as of commit 4e0c096; the defaults are those of nanoVLM-460M, without scaling up."""

    name: ClassVar[str] = "nanovlm"
    model_types: ClassVar[tuple[str, ...]] = ("nanovlm",)
    image_token: ClassVar[str] = IMAGE_TOKEN
    anchor_token: ClassVar[str] = IMAGE_TOKEN
    in_message: ClassVar[str] = IMAGE_TOKEN
    is_transformers: ClassVar[bool] = False
    pixel_name: ClassVar[str] = "images"

    tiling: Tiling = field(default_factory=Tiling)
    """How pictures are cut."""
    image_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    image_std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, config: Settings, processor: Settings) -> NanoVLM:  # noqa: ARG003, its config says all
        """Return the family of a model's `cfg`.

        Args:
            config: `dataclasses.asdict(model.cfg)`.
            processor: Not needed.
        """
        tile_size = integer(config, "vit_img_size", 512)
        return cls(
            tiling=Tiling(
                tile_size=tile_size,
                max_side=integer(config, "max_img_size", 2048 // tile_size * tile_size),
                resize_to_max_side=bool(config.get("resize_to_max_side_len", False)),
                patch_size=integer(config, "vit_patch_size", 16),
                tokens_per_tile=integer(config, "mp_image_token_length", 64),
            )
        )

    def sizes(self) -> tuple[str, ...]:
        """Return no field: the tiling checks its own."""
        return ()

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.tiling.tile_size

    def image(self, height: int, width: int) -> ImageGeometry:
        """Return how an upright image is cut.

        Args:
            height: Pixels, at least 1.
            width: Pixels, at least 1.
        """
        return self.tiling.image(height, width)

    def smaller(self) -> NanoVLM | None:
        """Return the family with a largest side of one tile less, or None at one tile."""
        tiling = self.tiling.smaller()
        return None if tiling is None else replace(self, tiling=tiling)

    def special_tokens(self) -> tuple[str, ...]:
        """Return every token that an expansion can hold."""
        if not self.tiling.position_tokens:
            return (IMAGE_TOKEN,)
        sides = range(self.tiling.max_grid_side)
        tags = (position_token(row, column) for row in sides for column in sides)
        return (IMAGE_TOKEN, *(GLOBAL_IMAGE_TOKEN,) * self.tiling.global_tile, *tags)

    def expansion(self, geometry: ImageGeometry) -> Pieces:
        """Return what takes the place of an image token, the global tile first.

        Args:
            geometry: How the image is cut.
        """
        rows, columns = geometry.grid.rows, geometry.grid.columns
        whole = self.tiling.global_tile  # a single tile is the whole picture
        tags = [GLOBAL_IMAGE_TOKEN] * whole
        if not whole or geometry.has_global_tile:
            tags += [position_token(row, column) for row in range(rows) for column in range(columns)]
        image = (IMAGE_TOKEN, self.tiling.tokens_per_tile)
        if not self.tiling.position_tokens:
            return (image,) * len(tags)
        return tuple(piece for tag in tags for piece in ((tag, 1), image))

    def cut(self, picture: Image, geometry: ImageGeometry, out: npt.NDArray[np.uint8]) -> None:
        """Write the tiles, the global one first.

        Args:
            picture: Mode RGB, upright.
            geometry: How it is cut.
            out: uint8 [geometry.num_tiles, P, P, 3].
        """
        tiles = torch.from_numpy(out).permute(0, 3, 1, 2)
        tile_image(picture, geometry, tile_size=self.tile_size, out=tiles, max_pixels=1 << 62)

    def arguments(self, rows: Rows) -> dict[str, object]:
        """Return input_ids, targets (labels shifted by one) and segment_ids.

        Args:
            rows: The batch.
        """
        targets = rows.labels.roll(-1, dims=1)
        targets[:, -1] = IGNORE_INDEX  # the first label of each segment is masked, so no other shift leaks
        arguments: dict[str, object] = {
            "input_ids": rows.input_ids,
            "targets": targets,
            "segment_ids": rows.segment_ids,
        }
        return arguments if rows.geometries else {**arguments, "images": []}

    def pixels(self, rows: Rows, dtype: torch.dtype) -> dict[str, object]:
        """Return images [N, 3, P, P].

        Args:
            rows: The batch, with at least one image.
            dtype: Scaled to [0, 1] in this, or torch.uint8.
        """
        return {"images": self.normalise(rows.tiles, dtype)}

    def prepare(self, model: torch.nn.Module) -> None:
        """Let each attention layer of the language model see its segment alone.

        Args:
            model: nanoVLM's VisionLanguageModel; changed in place.

        Raises:
            ConfigError: If it has no such layers.
        """
        layers = [layer for layer in model.modules() if all(hasattr(layer, part) for part in _PARTS)]
        if not layers:
            raise ConfigError(
                f"{type(model).__name__} has no attention layers like nanoVLM's ({', '.join(_PARTS)}): its "
                "samples cannot be kept apart"
            )
        if hasattr(model, "_vlmpack_segments"):
            return
        segments = _Segments(self)
        for layer in layers:
            layer.forward = _IsolatedAttention(layer, segments)
        model.register_forward_pre_hook(segments, with_kwargs=True)
        model._vlmpack_segments = segments  # type: ignore[assignment]

    def output_of(self, output: Any) -> torch.Tensor:
        """Return the logits, or without targets the last hidden states.

        Args:
            output: (logits, loss).
        """
        found: torch.Tensor = output[0]
        return found

    def unit_tokens(self, batch: Mapping[str, object]) -> list[int]:
        """Return the image tokens of each tile of a batch.

        Args:
            batch: A packed batch.
        """
        return [self.tiling.tokens_per_tile] * len(batch["images"])  # type: ignore[arg-type]


class _Segments:
    """Takes `segment_ids` out of a call, keeps the mask for the attention layers, and normalises bytes."""

    def __init__(self, family: NanoVLM) -> None:
        self._family = family
        self.seen: torch.Tensor | None = None
        """bool [B, 1, L, L], None where the call is no packed batch."""

    def __call__(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        segment_ids = kwargs.pop("segment_ids", None)
        self.seen = None
        if segment_ids is not None:
            same = segment_ids[:, :, None] == segment_ids[:, None, :]  # padding sees padding: no empty row
            self.seen = (same & torch.ones_like(same[0]).tril())[:, None]
        images = kwargs.get("images")
        if isinstance(images, torch.Tensor) and images.dtype == torch.uint8:
            kwargs["images"] = self._family.normalise(images, next(model.parameters()).dtype)
        return args, kwargs


class _IsolatedAttention:
    """What stands in for an attention layer's forward; without segments it is the layer's own."""

    def __init__(self, layer: torch.nn.Module, segments: _Segments) -> None:
        self._layer, self._segments, self._own = layer, segments, layer.forward

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        block_kv_cache: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen = self._segments.seen
        if seen is None:
            own: tuple[torch.Tensor, dict[str, torch.Tensor]] = self._own(
                x, cos, sin, attention_mask, block_kv_cache
            )
            return own
        layer: Any = self._layer
        shape = (*x.shape[:2], -1, layer.head_dim)
        query = _turned(layer.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        key = _turned(layer.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        value = layer.v_proj(x).view(shape).transpose(1, 2)
        groups = layer.n_heads // layer.n_kv_heads
        out = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            attn_mask=seen,
            dropout_p=layer.dropout if layer.training else 0.0,
        )
        out = layer.resid_dropout(layer.out_proj(out.transpose(1, 2).flatten(2)))
        return out, {"key": key, "value": value}


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return queries or keys [B, heads, L, dim] at their rotary positions."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
