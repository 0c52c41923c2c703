"""Features: make a Hugging Face data set give images as bytes, and everything else as it is."""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel, Dataset, Image, IterableDataset, LargeList, List, Value


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the data set with image decoding switched off, so that reading a row costs no pixels.

    A data set with a transform or a format of its own is returned as it is: what it makes is what the
    user wants.

    Args:
        dataset: One split.
    """
    features = dataset.features
    if features is None:
        return dataset
    if isinstance(dataset, Dataset):
        if dataset.format["type"] is not None:
            return dataset
        if all(_is_plain(feature) for feature in features.values()):
            return dataset.with_format("arrow")  # a cast would rewrite the whole table
    for column, feature in features.items():
        bare = _without_decoding(feature)
        if bare != feature:
            dataset = dataset.cast_column(column, bare)
    return dataset


def _is_plain(feature: Any) -> bool:
    """Return whether Arrow's own values of this feature are the user's, images as bytes and path."""
    if isinstance(feature, List | LargeList):
        return _is_plain(feature.feature)
    if isinstance(feature, dict):
        return all(_is_plain(inner) for inner in feature.values())
    return isinstance(feature, Value | ClassLabel | Image)


def _without_decoding(feature: Any) -> Any:
    """Return the feature with every image in it left as bytes and path."""
    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=False)
    if isinstance(feature, List | LargeList):
        return type(feature)(_without_decoding(feature.feature))
    if isinstance(feature, dict):
        return {name: _without_decoding(inner) for name, inner in feature.items()}
    return feature
