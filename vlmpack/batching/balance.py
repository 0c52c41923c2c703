"""Balance: weights of the tasks' losses from the norms of their gradients.

`rule="legacy"` is the reference document's: weight *= (mean norm / norm)^alpha, normalised to sum to the
number of tasks. It is applied to the norms of the *weighted* losses. Applied to unweighted ones, as the
document's text can be read, it never stops: one task has all the weight within ten steps. With weighted
norms the weights' logarithms converge by the factor |1 - alpha| an update: at once for alpha = 1, within
1 % after 9 updates at 1.5 and 59 at 1.9, never from 2 on. It makes all weighted gradients equally large.

`rule="gradnorm"` is the paper's (Chen et al., "GradNorm", ICML 2018): a task that has learnt less than the
others, by its loss relative to its first, is to have the larger gradient: target = mean norm * r^alpha with
r = (L / L0) / mean(L / L0). Weights follow by gradient descent (Adam) on sum |norm - target|. L / L0 is the
*inverse* training rate already, so that the slower task has r > 1 and gains weight; a public implementation
has this sign the other way round.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import torch

from vlmpack.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

logger = logging.getLogger(__name__)

BalanceRule: TypeAlias = Literal["legacy", "gradnorm"]
"""The document's rule, or the paper's."""

DEFAULT_TASKS: Final = ("T1", "T2", "T3")
MIN_WEIGHT: Final = 1e-6
"""Least weight of a task, as a share of the mean weight: from 0 no multiplication leads back."""
ZERO_SHARE: Final = 1e-12
"""A norm below this share of the mean norm is none: rounding, not a gradient."""


def compute_gradient_norm(model: torch.nn.Module | Iterable[torch.nn.Parameter]) -> float:
    """Return the norm of all gradients of a model, or of these parameters; 0 where there are none.

    It is one number for the whole model: called after a backward of a batch of several tasks it says the
    same for each. `TaskGradients.norms` tells tasks apart.

    Args:
        model: After backward.
    """
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else model
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([gradient.norm().double() for gradient in gradients])))


def documented_update(
    weights: Mapping[str, float], grad_norms: Mapping[str, float], alpha: float
) -> dict[str, float]:
    """Return the document's update, to the letter.

    Each weight is multiplied by (mean norm / norm)^alpha; then all are scaled to sum to the number of tasks.

    Args:
        weights: Of each task.
        grad_norms: Of the same tasks, none of them zero.
        alpha: The exponent.
    """
    mean = sum(grad_norms.values()) / len(grad_norms)
    raised = {task: weight * (mean / grad_norms[task]) ** alpha for task, weight in weights.items()}
    total = sum(raised.values())
    return {task: weight * len(raised) / total for task, weight in raised.items()}


class GradNormBalancer:
    """Keeps a loss weight for each task, and moves it by the tasks' gradient norms.

    A task that is absent from a step, or has a zero or non-finite norm or loss there, keeps its weight; the
    last two are counted in `num_skipped`. Weights are positive and sum to the number of tasks.

    Args:
        task_types: All tasks. One that is not among them is an error, see `add_task`.
        alpha: The exponent. "legacy": 0 < alpha < 2, where it converges. "gradnorm": alpha >= 0, how strongly
            slow tasks are preferred.
        rule: "legacy" or "gradnorm".
        lr: Learning rate of the weights; only "gradnorm" has one.
        norm_decay: Norms are averaged over steps with this decay before they count; 0 is as documented. Where
            steps hold few samples of a task its norm is mostly noise, which the legacy rule follows fully.
        initial_weights: To begin with, scaled to sum to the number of tasks; None: 1 each.

    Raises:
        ConfigError: If a setting is invalid.
    """

    def __init__(
        self,
        task_types: Sequence[str] = DEFAULT_TASKS,
        alpha: float = 1.5,
        *,
        rule: BalanceRule = "legacy",
        lr: float = 0.025,
        norm_decay: float = 0.0,
        initial_weights: Mapping[str, float] | None = None,
    ) -> None:
        if rule not in get_args(BalanceRule):
            raise ConfigError(f"rule must be one of {get_args(BalanceRule)}, got {rule!r}")
        if rule == "legacy" and not 0 < alpha < 2:
            raise ConfigError(
                "the legacy rule converges for 0 < alpha < 2 only, its errors shrink by |1 - alpha|; got "
                f"{alpha}"
            )
        if not (0 <= alpha < math.inf and 0 < lr < math.inf):
            raise ConfigError(f"alpha must be at least 0 and lr positive, got {alpha} and {lr}")
        if not 0 <= norm_decay < 1:
            raise ConfigError(f"norm_decay must be a fraction, 0 <= decay < 1, got {norm_decay}")
        if not task_types or len(set(task_types)) != len(task_types):
            raise ConfigError(f"task_types must be names without repeats, got {list(task_types)}")
        self.alpha = alpha
        self.rule: BalanceRule = rule
        self.lr = lr
        self.norm_decay = norm_decay
        self.num_updates = 0
        """Updates that changed a weight."""
        self.num_skipped: dict[str, int] = dict.fromkeys(task_types, 0)
        """For each task, updates in which it was there but zero or not finite."""
        self._weights = self._initial(task_types, initial_weights)
        self._first_losses: dict[str, float] = {}
        self._norms: dict[str, float] = {}
        self._adam: dict[str, _Adam] = {task: _Adam() for task in task_types}

    @staticmethod
    def _initial(tasks: Sequence[str], initial: Mapping[str, float] | None) -> dict[str, float]:
        if initial is None:
            return dict.fromkeys(tasks, 1.0)
        if set(initial) != set(tasks):
            raise ConfigError(f"initial_weights are for {sorted(initial)}, the tasks are {sorted(tasks)}")
        if not all(0 < weight < math.inf for weight in initial.values()):
            raise ConfigError(f"initial_weights must be positive and finite, got {dict(initial)}")
        total = math.fsum(initial.values())
        return {task: initial[task] * len(tasks) / total for task in tasks}

    @property
    def weights(self) -> dict[str, float]:
        """The loss weight of each task."""
        return dict(self._weights)

    @staticmethod
    def compute_gradient_norm(model: torch.nn.Module | Iterable[torch.nn.Parameter]) -> float:
        """Return the norm of all gradients of a model; see the function of this name."""
        return compute_gradient_norm(model)

    def add_task(self, task_type: str) -> None:
        """Take in a new task with the mean weight; the others keep theirs.

        Raises:
            ConfigError: If it is there already.
        """
        if task_type in self._weights:
            raise ConfigError(f"the task {task_type!r} is there already")
        self._weights[task_type] = 1.0
        self._adam[task_type] = _Adam()
        self.num_skipped[task_type] = 0

    def update(
        self, grad_norms: Mapping[str, float], losses: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Move the weights by one step's norms, and return them.

        Args:
            grad_norms: Norm of the gradient of each present task's loss, *without* its weight, over the
                whole step and on the parameters that the tasks share.
            losses: Of the same tasks; the paper's rule needs them.

        Raises:
            ConfigError: If a task was never announced, or losses are missing.
        """
        self._check_known(grad_norms)
        if self.rule == "gradnorm":
            self._check_losses(grad_norms, losses)
        seen = self._present(grad_norms, losses if self.rule == "gradnorm" else None)
        for task, norm in seen.items():
            before = self._norms.get(task, norm)
            self._norms[task] = self.norm_decay * before + (1 - self.norm_decay) * norm
        present = {task: self._norms[task] * self._weights[task] for task in seen}
        if len(present) < 2:
            return self.weights  # one task has nobody to be balanced against
        share = math.fsum(self._weights[task] for task in present)
        if self.rule == "legacy":
            moved = documented_update({task: self._weights[task] for task in present}, present, self.alpha)
        else:
            assert losses is not None
            moved = self._descend(present, {task: losses[task] for task in present})
        self._set(moved, share)
        self.num_updates += 1
        return self.weights

    def _check_known(self, tasks: Iterable[str]) -> None:
        unknown = sorted(set(tasks) - set(self._weights))
        if unknown:
            raise ConfigError(
                f"tasks {unknown} were never announced; known are {sorted(self._weights)}. Name them in "
                "task_types, or take them in with add_task"
            )

    @staticmethod
    def _check_losses(grad_norms: Mapping[str, float], losses: Mapping[str, float] | None) -> None:
        missing = sorted(set(grad_norms) - set(losses or ()))
        if missing:
            raise ConfigError(f"rule='gradnorm' compares losses with their first ones; {missing} have none")

    def _present(self, norms: Mapping[str, float], losses: Mapping[str, float] | None) -> dict[str, float]:
        finite = {task: norm for task, norm in norms.items() if math.isfinite(norm)}
        floor = ZERO_SHARE * max(finite.values(), default=0.0)
        present = {}
        for task, norm in norms.items():
            loss = losses[task] if losses is not None else 1.0
            # A first loss of 0 has nothing to be compared with.
            learnt = self._first_losses.get(task, loss) > 0
            if task in finite and norm > floor and math.isfinite(loss) and learnt:
                present[task] = norm
                continue
            self.num_skipped[task] += 1
            if self.num_skipped[task] == 1:
                logger.warning(
                    "task %s keeps its weight: gradient norm %s, loss %s. Further such steps are counted in "
                    "num_skipped",
                    task,
                    norm,
                    "not used" if losses is None else loss,
                )
        return present

    def _descend(self, norms: Mapping[str, float], losses: Mapping[str, float]) -> dict[str, float]:
        progress = {task: loss / self._first_losses.setdefault(task, loss) for task, loss in losses.items()}
        mean_norm = math.fsum(norms.values()) / len(norms)
        mean_progress = math.fsum(progress.values()) / len(progress)
        moved = {}
        for task, norm in norms.items():
            rate = max(progress[task], 0.0) / mean_progress if mean_progress > 0 else 1.0
            target = mean_norm * rate**self.alpha  # a constant for the descent
            slope = math.copysign(norm / self._weights[task], norm - target) if norm != target else 0.0
            moved[task] = self._weights[task] - self.lr * self._adam[task].direction(slope)
        return moved

    def _set(self, moved: Mapping[str, float], share: float) -> None:
        """Scale the moved weights so that they share what they had; the others' sum is untouched."""
        floor = MIN_WEIGHT * share / len(moved)
        kept = {task: max(weight, floor) for task, weight in moved.items()}
        total = math.fsum(kept.values())
        for task, weight in kept.items():
            self._weights[task] = weight * share / total

    def state_dict(self) -> dict[str, object]:
        """Return plain values that `load_state_dict` takes."""
        return {
            "rule": self.rule,
            "weights": dict(self._weights),
            "first_losses": dict(self._first_losses),
            "norms": dict(self._norms),
            "adam": {task: adam.state() for task, adam in self._adam.items()},
            "num_updates": self.num_updates,
            "num_skipped": dict(self.num_skipped),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state.

        Args:
            state: From `state_dict`.

        Raises:
            ConfigError: If it is of another rule.
        """
        if state["rule"] != self.rule:
            raise ConfigError(f"the saved balancer has rule {state['rule']!r}, this one {self.rule!r}")
        self._weights = {str(task): float(weight) for task, weight in _items(state["weights"])}
        self._first_losses = {str(task): float(loss) for task, loss in _items(state["first_losses"])}
        self._norms = {str(task): float(norm) for task, norm in _items(state["norms"])}
        self._adam = {str(task): _Adam(*map(float, values)) for task, values in _items(state["adam"])}
        self.num_updates = int(str(state["num_updates"]))
        self.num_skipped = {str(task): int(count) for task, count in _items(state["num_skipped"])}


def _items(value: object) -> Iterable[tuple[object, Any]]:
    assert isinstance(value, dict)
    return value.items()


class _Adam:
    """Adam for one number, as in torch.optim: there, state of one number a task would be tensors.

    A task that is absent keeps its averages, which an optimizer over all weights would let decay.
    """

    def __init__(self, mean: float = 0.0, square: float = 0.0, step: float = 0.0) -> None:
        self._mean, self._square, self._step = mean, square, int(step)

    def direction(self, slope: float) -> float:
        """Return what is subtracted, for a learning rate of 1."""
        self._step += 1
        self._mean = 0.9 * self._mean + 0.1 * slope
        self._square = 0.999 * self._square + 0.001 * slope * slope
        mean = self._mean / (1 - 0.9**self._step)
        square = self._square / (1 - 0.999**self._step)
        return mean / (math.sqrt(square) + 1e-8)

    def state(self) -> list[float]:
        """Return the constructor's arguments."""
        return [self._mean, self._square, self._step]
