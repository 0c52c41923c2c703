"""Read a model's config and an image processor's, as JSON has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from vlmpack.families.family import Settings


def as_settings(config: object) -> Settings:
    """Return a config object, a processor or a mapping as a mapping.

    Args:
        config: A mapping, or something with `to_dict`.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        raise ConfigError(f"expected a config or a mapping, got {type(config).__name__}")
    found: Settings = to_dict()
    return found


def section(settings: Settings, name: str) -> Settings:
    """Return a part of a config, empty where it has none.

    Args:
        settings: The config.
        name: Of the part.

    Raises:
        ConfigError: If it is no mapping.
    """
    part = settings.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"{name} must be a mapping, got {part!r}")
    return part


def integer(settings: Settings, name: str, default: int) -> int:
    """Return a whole number of a config.

    Args:
        settings: The config.
        name: Of the number.
        default: Where it says nothing.

    Raises:
        ConfigError: If it is no whole number.
    """
    value = settings.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    return value


def square(settings: Settings, name: str, default: int) -> int:
    """Return the side of a square size: a number, [h, w], or {height, width}.

    Args:
        settings: The config.
        name: Of the size.
        default: Where it says nothing.

    Raises:
        ConfigError: If it is no square.
    """
    value = settings.get(name)
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        value = (value["height"], value["width"])
    if isinstance(value, Sequence) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return integer({name: value}, name, default)


def colours(settings: Settings, name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return a number for each of three colours.

    Args:
        settings: The config.
        name: Of the numbers.
        default: Where it says nothing.

    Raises:
        ConfigError: If there are not three.
    """
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, Sequence) or len(value) != 3:
        raise ConfigError(f"{name} must be three numbers, got {value!r}")
    return (float(value[0]), float(value[1]), float(value[2]))
