"""Every family that vlmpack knows. A new one is a file, and a line here."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from vlmpack.errors import ConfigError
from vlmpack.families.gemma3 import Gemma3
from vlmpack.families.idefics3 import Idefics3, SmolVLM
from vlmpack.families.internvl import InternVL
from vlmpack.families.llava import Llava
from vlmpack.families.llava_onevision import LlavaOnevision
from vlmpack.families.nanovlm import NanoVLM
from vlmpack.families.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
from vlmpack.families.settings import as_settings

if TYPE_CHECKING:
    from vlmpack.families.family import Family

FAMILIES: Final[dict[str, type[Family]]] = {
    family.name: family
    for family in (
        Idefics3,
        SmolVLM,
        Qwen2VL,
        Qwen25VL,
        Qwen3VL,
        LlavaOnevision,
        Llava,
        InternVL,
        Gemma3,
        NanoVLM,
    )
}
"""By name."""


def family_for(model: object, processor: object = None) -> Family:
    """Return the family of a model.

    Args:
        model: A family's name, for its defaults; a model's config, as an object or as JSON has it; or the
            model itself.
        processor: The model's processor, its image processor or that one's config, for the sizes that only it
            knows; the defaults where None.

    Raises:
        ConfigError: If the family is unknown or a size is wrong.
    """
    settings = as_settings(getattr(processor, "image_processor", processor) or {})
    if isinstance(model, str):
        family = FAMILIES.get(model)
        if family is None:
            raise ConfigError(_unknown(model))
        return family.of({}, settings)
    found = getattr(model, "config", model)
    if dataclasses.is_dataclass(cfg := getattr(model, "cfg", None)) and not isinstance(cfg, type):
        found = {"model_type": NanoVLM.name, **dataclasses.asdict(cfg)}  # nanoVLM has no other name
    config = as_settings(found)
    kind = getattr(found, "model_type", config.get("model_type"))
    for family in FAMILIES.values():
        if kind in family.model_types:
            return family.of(config, settings)
    raise ConfigError(_unknown(kind))


def _unknown(kind: object) -> str:
    return (
        f"vlmpack knows no model family {kind!r}: how it isolates the samples of a pack is not known, so "
        f"none is assumed. Known: {', '.join(FAMILIES)}; docs/families.md says how to add one"
    )
