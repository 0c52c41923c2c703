"""Task gradients: each task's gradient of a whole step, however the step is split.

Micro-batches add to one buffer a task; products, norms and weights are taken once, at the end of the step.
A balanced step is therefore the same for any split, up to rounding. It costs a backward a task and
micro-batch, and memory: surgery keeps one set of gradients a task; weights alone keep the gradients of a few
shared parameters a task, and one set of all.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist

from vlmpack.errors import ConfigError, VlmpackError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vlmpack.batching.balance import GradNormBalancer
    from vlmpack.batching.surgery import GradientSurgery
logger = logging.getLogger(__name__)

_SUMMED: Final = "the weighted sum"
"""Holds the gradients of all tasks on parameters that are not shared."""

NonFinite: TypeAlias = Literal["raise", "drop"]
"""What to do with a task whose gradient is not finite: stop, or leave it out of the step."""


class TaskGradients:
    """Collects the tasks' gradients of one step and writes their weighted sum to `.grad`.

    Nothing else may call backward in between: gradients are taken by `torch.autograd.grad`, which neither
    touches `.grad` nor starts DDP's reduction (call `all_reduce` instead) nor works through reentrant
    checkpointing.

    Args:
        parameters: All that are trained.
        task_types: All tasks, in the order of the Gramian.
        shared: What norms and products are taken on; None: all parameters. The GradNorm paper takes the last
            layer that the tasks share.

    Raises:
        ConfigError: If there is nothing to train, no task, or a shared parameter that is not trained.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        task_types: Sequence[str],
        *,
        shared: Iterable[torch.nn.Parameter] | None = None,
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.task_types = tuple(task_types)
        if not self.parameters or not self.task_types:
            raise ConfigError("balancing needs parameters that are trained, and tasks")
        places = {id(parameter): place for place, parameter in enumerate(self.parameters)}
        wanted = self.parameters if shared is None else list(shared)
        if not wanted or any(id(parameter) not in places for parameter in wanted):
            raise ConfigError("shared parameters must be some of those that are trained")
        self._shared = {places[id(parameter)] for parameter in wanted}
        self._buffers: dict[str, list[torch.Tensor | None]] = {}
        self._reached: dict[str, set[int]] = {}

    def begin_step(self) -> None:
        """Forget what was collected: a new step, or the same one once more. The memory is kept."""
        self._reached = {}
        for buffers in self._buffers.values():
            for buffer in buffers:
                if buffer is not None:
                    buffer.zero_()

    def add(
        self, task_losses: Mapping[str, torch.Tensor], weights: Mapping[str, float] | None = None
    ) -> None:
        """Add one micro-batch. If it fails, for want of memory or otherwise, nothing of it was added.

        Args:
            task_losses: For each task that is present, the micro-batch's part of the step's loss: sums,
                divided by what the whole step holds.
            weights: Of the tasks, if they are known and will not change in this step: gradients of parameters
                that are not shared are then summed at once. None keeps each task's apart.

        Raises:
            ConfigError: If a task was never announced, or no trained parameter has a part in its loss.
        """
        unknown = sorted(set(task_losses) - set(self.task_types))
        if unknown:
            raise ConfigError(f"tasks {unknown} were never announced; known are {list(self.task_types)}")
        fresh: dict[str, dict[int, torch.Tensor]] = {}
        tasks = list(task_losses)
        for task in tasks:
            gradients = torch.autograd.grad(
                task_losses[task], self.parameters, retain_graph=task != tasks[-1], allow_unused=True
            )
            fresh[task] = {place: each for place, each in enumerate(gradients) if each is not None}
            if not fresh[task]:
                raise ConfigError(f"no trained parameter has a part in the loss of task {task!r}")
            for place in fresh[task]:
                self._buffer(self._holder(task, place, weights), place)
        for task, reached in fresh.items():
            for place, gradient in reached.items():
                holder = self._holder(task, place, weights)
                weight = 1.0 if holder == task or weights is None else weights[task]
                # into memory of our own: autograd may hand one tensor to two parameters
                self._buffer(holder, place).add_(gradient.detach(), alpha=weight)
                self._reached.setdefault(holder, set()).add(place)
            self._reached.setdefault(task, set())

    def _holder(self, task: str, place: int, weights: Mapping[str, float] | None) -> str:
        return task if weights is None or place in self._shared else _SUMMED

    def _buffer(self, task: str, place: int) -> torch.Tensor:
        buffers = self._buffers.setdefault(task, [None] * len(self.parameters))
        buffer = buffers[place]
        if buffer is None:
            buffer = buffers[place] = torch.zeros_like(
                self.parameters[place], memory_format=torch.preserve_format
            ).detach()
        return buffer

    def drop(self, task: str) -> None:
        """Leave a task out of this step.

        Args:
            task: One that is present.
        """
        for place in self._reached.pop(task):
            self._buffer(task, place).zero_()

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum over ranks; every rank must call it, whatever tasks it had.

        The losses must be divided by what the step holds over *all* ranks.

        Args:
            group: The ranks; None: all.
        """
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return
        holders = (*self.task_types, _SUMMED)
        here = torch.zeros(len(holders), len(self.parameters), dtype=torch.uint8)
        for row, holder in enumerate(holders):
            here[row, list(self._reached.get(holder, ()))] = 1
        here = here.to(self.parameters[0].device)
        dist.all_reduce(here, op=dist.ReduceOp.MAX, group=group)
        for row, place in here.nonzero().tolist():
            dist.all_reduce(self._buffer(holders[row], place), group=group)
            self._reached.setdefault(holders[row], set()).add(place)

    @property
    def present(self) -> tuple[str, ...]:
        """The tasks of this step, in the order of `task_types`."""
        return tuple(task for task in self.task_types if task in self._reached)

    def gramian(self) -> torch.Tensor:
        """Return g_i . g_j of the present tasks on the shared parameters: float64 [T, T], on the CPU."""
        tasks = self.present
        products = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
        for i, first in enumerate(tasks):
            for j, second in enumerate(tasks[: i + 1]):
                for place in sorted(self._reached[first] & self._reached[second] & self._shared):
                    one, two = self._buffer(first, place), self._buffer(second, place)
                    products[i, j] += torch.dot(one.flatten().double(), two.flatten().double()).cpu()
        lower = products.tril(-1)
        return products + lower.T

    def norms(self) -> dict[str, float]:
        """Return the norm of each present task's gradient on the shared parameters, without any weight."""
        squares = torch.diagonal(self.gramian()).clamp(min=0.0)
        return dict(zip(self.present, squares.sqrt().tolist(), strict=True))

    def write(self, coefficients: Mapping[str, float]) -> None:
        """Add sum_t c_t g_t to `.grad` of every parameter, and forget the step.

        Args:
            coefficients: For each present task.
        """
        counts = {task: coefficients[task] for task in self.present} | {_SUMMED: 1.0}
        for holder, count in counts.items():
            for place in sorted(self._reached.get(holder, ())):
                parameter = self.parameters[place]
                part = self._buffer(holder, place) * count
                parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
        self.begin_step()


def last_shared_block(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the trained parameters of the language model's last block, or all trained ones.

    Every task's gradient goes through it, at the end, as the GradNorm paper has it. In a model that does not
    say which part its decoder is, the longest list of blocks is taken for it.

    Args:
        model: Any.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    searched = decoder if isinstance(decoder, torch.nn.Module) else model
    lists = [each for each in searched.modules() if isinstance(each, torch.nn.ModuleList) and len(each)]
    for blocks in sorted(lists, key=len, reverse=True):
        trained = [parameter for parameter in blocks[-1].parameters() if parameter.requires_grad]
        if trained:
            return trained
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class TaskBalancing:
    """One balanced step: collect, project, write, and move the weights for the next step.

    Weights of a step are fixed before it begins, so that they depend on earlier steps only.

    Args:
        gradients: Collects the tasks' gradients.
        balancer: Gives and moves the weights; None: `weights`, fixed.
        surgery: `PCGrad` or `GradVac`, on the weighted gradients; None: their sum.
        weights: Of the tasks where there is no balancer; None: 1 each.
        non_finite: For a task whose gradient is not finite: "raise", or "drop" it from the step, counted in
            `num_dropped` and logged.

    Raises:
        ConfigError: If a setting is invalid.
    """

    def __init__(
        self,
        gradients: TaskGradients,
        *,
        balancer: GradNormBalancer | None = None,
        surgery: GradientSurgery | None = None,
        weights: Mapping[str, float] | None = None,
        non_finite: NonFinite = "raise",
    ) -> None:
        if non_finite not in get_args(NonFinite):
            raise ConfigError(f"non_finite must be one of {get_args(NonFinite)}, got {non_finite!r}")
        self.gradients = gradients
        self.balancer = balancer
        self.surgery = surgery
        self.non_finite: NonFinite = non_finite
        self.num_dropped: dict[str, int] = dict.fromkeys(gradients.task_types, 0)
        """For each task, steps that it was left out of."""
        self.grad_norms: dict[str, float] = {}
        """Of the latest step, without weights."""
        self._weights = dict(weights or {})

    @property
    def weights(self) -> dict[str, float]:
        """The loss weight of each task, now."""
        if self.balancer is not None:
            return self.balancer.weights
        return {task: self._weights.get(task, 1.0) for task in self.gradients.task_types}

    def begin_step(self) -> None:
        """Start a step, or start it once more."""
        self.gradients.begin_step()

    def backward(self, task_losses: Mapping[str, torch.Tensor]) -> None:
        """Add one micro-batch, whose losses have no weights yet; see `TaskGradients.add`."""
        apart = self.surgery is not None or self.non_finite == "drop"
        self.gradients.add(task_losses, None if apart else self.weights)

    def finish_step(
        self,
        step: int,
        losses: Mapping[str, float] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Write the step's gradient, then move the weights.

        Args:
            step: Its number.
            losses: Of the present tasks, over the whole step; the paper's rule needs them.
            shares: What part of the step's tokens (or samples) each task has, where losses were divided by
                the whole step's: balanced are then the norms of the tasks' *mean* losses. Otherwise a task
                with few samples in a step would seem to have a small gradient.

        Returns:
            What each present task's gradient counted.
        """
        self.gradients.all_reduce()
        self._without_non_finite(step)
        tasks = self.gradients.present
        weights = self.weights
        gramian = self.gradients.gramian()
        self.grad_norms = dict(zip(tasks, torch.diagonal(gramian).clamp(min=0).sqrt().tolist(), strict=True))
        counts = {task: weights[task] for task in tasks}
        if self.surgery is not None and len(tasks) > 1:
            scale = torch.tensor([weights[task] for task in tasks], dtype=torch.float64)
            parts = self.surgery.coefficients(gramian * scale * scale[:, None], tasks, step)
            counts = {task: float(part) * weights[task] for task, part in zip(tasks, parts, strict=True)}
        self.gradients.write(counts)
        if shares is not None:
            self.grad_norms = {
                task: norm / shares[task] for task, norm in self.grad_norms.items() if shares.get(task)
            }
        if self.balancer is not None:
            self.balancer.update(self.grad_norms, losses)
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, as plain values fit for JSON."""
        save = getattr(self.surgery, "state_dict", None)
        return {
            "balancer": None if self.balancer is None else self.balancer.state_dict(),
            "surgery": None if save is None else save(),
            "num_dropped": dict(self.num_dropped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: From `state_dict`.

        Raises:
            ConfigError: If one has a balancer, or a surgery that learns, and the other has not.
        """
        load = getattr(self.surgery, "load_state_dict", None)
        for name, mine in (("balancer", self.balancer), ("surgery", load)):
            if (mine is None) != (state[name] is None):
                raise ConfigError(
                    f"the saved run had {'a' if mine is None else 'no'} {name} of task gradients and this "
                    f"one has {'none' if mine is None else 'one'}: resume with the old settings"
                )
        if self.balancer is not None:
            self.balancer.load_state_dict(state["balancer"])
        if load is not None:
            load(state["surgery"])
        self.num_dropped = {str(task): int(count) for task, count in state["num_dropped"].items()}

    def _without_non_finite(self, step: int) -> None:
        for task, norm in self.gradients.norms().items():
            if math.isfinite(norm):
                continue
            if self.non_finite == "raise":
                raise VlmpackError(
                    f"step {step}: the gradient of task {task!r} is not finite ({norm}). Look at its samples "
                    "and its loss, or lower the learning rate; non_finite='drop' leaves the task out of such "
                    "a step"
                )
            logger.warning("step %d: task %s is left out, its gradient is not finite", step, task)
            self.num_dropped[task] += 1
            self.gradients.drop(task)
