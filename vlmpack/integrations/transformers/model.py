"""Model: what the trainer sets on it before, and reads off its outputs after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def switch_caches_off(model: Any) -> None:
    """Switch the cache off in both configs: Trainer sets the outer one only, Qwen-VL asks the text model's.

    Args:
        model: Any; one without a config is left alone.
    """
    config = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False
        config.get_text_config().use_cache = False


def auxiliary_loss(model: Any, outputs: Any) -> torch.Tensor | None:
    """Return a mixture of experts' load-balancing loss, weighed as its config says, or None.

    Args:
        model: Says the coefficient.
        outputs: Of its forward.
    """
    loss = outputs.get("aux_loss") if isinstance(outputs, dict) else None
    if loss is None:
        return None
    coefficient = float(getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0))
    weighed: torch.Tensor = coefficient * loss
    return weighed
