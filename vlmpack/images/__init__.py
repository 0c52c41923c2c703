"""Compressed images -> headers for planning, pixels for training."""

from vlmpack.images.decode import decode, to_rgb
from vlmpack.images.header import MAX_PIXELS, ImageHeader, read_header
from vlmpack.images.resize import DynamicResize
from vlmpack.images.source import ImageSource
from vlmpack.images.tile import GlobalAndSplitImages, SplitImage, tile_image, to_float

__all__ = [
    "MAX_PIXELS",
    "DynamicResize",
    "GlobalAndSplitImages",
    "ImageHeader",
    "ImageSource",
    "SplitImage",
    "decode",
    "read_header",
    "tile_image",
    "to_float",
    "to_rgb",
]
