"""Compressed images -> headers for planning, pixels for training."""

from vlmpack.images.accelerate import accelerators
from vlmpack.images.decode import decode, to_rgb
from vlmpack.images.header import MAX_PIXELS, ImageHeader, read_header
from vlmpack.images.resize import DynamicResize
from vlmpack.images.source import ImageSource
from vlmpack.images.tile import GlobalAndSplitImages, Mode, SplitImage, empty_tiles, tile_image, to_float
from vlmpack.images.warm import warm_kernels

__all__ = [
    "MAX_PIXELS",
    "DynamicResize",
    "GlobalAndSplitImages",
    "ImageHeader",
    "ImageSource",
    "Mode",
    "SplitImage",
    "accelerators",
    "decode",
    "empty_tiles",
    "read_header",
    "tile_image",
    "to_float",
    "to_rgb",
    "warm_kernels",
]
