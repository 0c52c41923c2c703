"""What one block of a model allocates, keeps for backward, and frees: a tape without numbers in it.

The tape runs a block's operations in the order in which PyTorch would, but a tensor here is only a
size. Each operation says what it allocates, what autograd keeps for its backward, and which gradients
the backward makes; the tape adds up what is alive. Sizes are affine in the number of rows (a row is one
tile of the vision encoder, or one packed sequence of the language model), so one run gives the closed
form for every batch:

    forward   x --norm--> h --linear--> y        live bytes: |  x  | x h | x h y | x y |
    keeps        x, stats     h, cast of W                      kept ones stay until backward
    backward  in reverse: allocate gradients, then let go of what the operation kept

`tests/unit/memory/test_oracle.py` holds it to the bytes that autograd keeps on real models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmpack.memory.program import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vlmpack.memory.program import Program


@dataclass(frozen=True, slots=True)
class Bytes:
    """An amount of memory that is affine in the number of rows: `fixed + per_row * rows`."""

    fixed: int = 0
    """Bytes that do not depend on the batch."""
    per_row: int = 0
    """Bytes of one row: a tile, or a packed sequence."""

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.fixed + other.fixed, self.per_row + other.per_row)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.fixed - other.fixed, self.per_row - other.per_row)

    def __mul__(self, times: int) -> Bytes:
        return Bytes(self.fixed * times, self.per_row * times)

    def at(self, rows: float) -> int:
        """Return the bytes for this many rows."""
        return self.fixed + int(self.per_row * rows)


NOTHING = Bytes()
"""Zero bytes."""


def highest(amounts: Iterable[Bytes]) -> tuple[Bytes, ...]:
    """Return the amounts that no other one exceeds for every number of rows: the upper envelope's lines."""
    kept: list[Bytes] = []
    for amount in sorted(set(amounts), key=lambda b: (b.per_row, b.fixed), reverse=True):
        if not kept or amount.fixed > kept[-1].fixed:
            kept.append(amount)
    return tuple(kept)


@dataclass(slots=True, eq=False)
class Storage:
    """A piece of memory and how many still need it."""

    size: Bytes
    users: int = 1


@dataclass(slots=True, eq=False)
class Tensor:
    """A size with a data type; views share their storage and their gradient's place."""

    storage: Storage
    features: int
    """Elements a token; negative values never occur."""
    itemsize: int
    """Bytes an element."""
    tracked: bool
    """Whether a gradient flows back into it."""
    slot: object = field(default_factory=object)
    """Where its gradient is collected."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter that an operation uses."""

    elements: int
    trainable: bool
    itemsize: int
    matmul: bool = False
    """Whether autocast casts it to the compute type."""


@dataclass(slots=True, eq=False)
class _Node:
    slots: tuple[object, ...]
    """Its outputs' places; more than one after a split."""
    kept: list[Storage]
    routes: list[tuple[object, Bytes | None]]
    """Gradients that it makes: where to, and the bytes; None hands on the incoming one."""
    weights: list[tuple[Weight, int]]
    """Parameters that get a gradient, and the bytes an element in which the kernel writes it."""
    scratch: Bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMemory:
    """What a block costs, as affine amounts of its rows."""

    saved: Bytes
    """Kept for backward: activations, weight casts, and the block's input if autograd keeps it."""
    output: Bytes
    """The block's output, which the next block counts as its input."""
    cached_casts: int
    """Bytes of weight casts that autocast holds to the end of the forward pass, kept or not."""
    forward: tuple[Bytes, ...]
    """Most that is alive in the forward pass, the input and everything kept so far included."""
    backward: tuple[Bytes, ...]
    """Most that is alive in the backward pass: what was kept, the incoming gradient, the new ones."""
    gradients: int
    """Bytes of the gradients of its trainable parameters."""
    input_gradient: Bytes
    """What backward hands to the block before."""
    weights: tuple[Weight, ...]
    """Its parameters in order of use."""
    program: Program
    """What it allocates and frees, move by move."""
    kept_tensors: tuple[Bytes, ...] = ()
    """Sizes of what is kept, one by one, for the allocator's rounding."""


class Tape:
    """Runs one block's program on sizes; see the module's first lines.

    Args:
        tokens: Tokens of a row: patches of a tile, or positions of a packed sequence.
        weight_bytes: Bytes an element of the parameters.
        compute_bytes: Bytes an element in matrix multiplications; differs under autocast.
        gradient_bytes: Bytes an element of the parameters' gradients.
        grad_enabled: False runs the program as under `torch.no_grad`.
        accumulating: Whether the gradients exist before this backward: new ones are then temporary.
        cpu: Follow the CPU kernels where they keep other amounts (used against the CPU oracle).
    """

    def __init__(
        self,
        *,
        tokens: int,
        weight_bytes: int = 4,
        compute_bytes: int = 4,
        gradient_bytes: int | None = None,
        grad_enabled: bool = True,
        accumulating: bool = False,
        cpu: bool = False,
    ) -> None:
        self.tokens = tokens
        self.weight_bytes = weight_bytes
        self.compute_bytes = compute_bytes
        self.gradient_bytes = weight_bytes if gradient_bytes is None else gradient_bytes
        self.autocast = compute_bytes != weight_bytes
        self.grad_enabled = grad_enabled
        self.accumulating = accumulating
        self.cpu = cpu
        self.live = NOTHING
        self.weights: list[Weight] = []
        self._nodes: list[_Node] = []
        self._seen: set[Bytes] = set()
        self._casts: list[Storage] = []
        self._recorder = Recorder()

    # ---- storage -------------------------------------------------------------------------------
    def allocate(self, size: Bytes) -> Storage:
        """Return new memory of this size."""
        self.live += size
        self._seen.add(self.live)
        storage = Storage(size)
        self._recorder.allocates(storage)
        return storage

    def release(self, storage: Storage) -> None:
        """Give up one use; the last one frees the memory."""
        storage.users -= 1
        assert storage.users >= 0, "a storage was released twice"
        if storage.users == 0:
            self.live -= storage.size
            self._recorder.frees(storage)

    def drop(self, *tensors: Tensor) -> None:
        """Say that the program's variables no longer hold these tensors."""
        for tensor in tensors:
            self.release(tensor.storage)

    def size(self, features: int, itemsize: int) -> Bytes:
        """Return the bytes of `features` elements a token."""
        return Bytes(0, self.tokens * features * itemsize)

    def size_of(self, tensor: Tensor) -> Bytes:
        """Return the bytes of a tensor's own elements (of a view: not of its whole storage)."""
        return self.size(tensor.features, tensor.itemsize)

    def input(self, features: int, itemsize: int, *, tracked: bool) -> Tensor:
        """Return a tensor that comes from outside the block."""
        storage = self.allocate(self.size(features, itemsize))
        return Tensor(storage, features, itemsize, tracked and self.grad_enabled)

    # ---- operations ----------------------------------------------------------------------------
    def op(
        self,
        features: int,
        itemsize: int,
        inputs: Sequence[Tensor],
        *,
        keeps: Sequence[Storage] = (),
        keeps_output: bool = False,
        passes_gradient: bool = False,
        weights: Sequence[tuple[Weight, int]] = (),
        scratch: Bytes = NOTHING,
        forward_scratch: Bytes = NOTHING,
    ) -> Tensor:
        """Run an operation: allocate its output and note what its backward will need.

        Args:
            features: Elements a token of the output.
            itemsize: Bytes an element of the output.
            inputs: Its tensors; each tracked one gets a gradient of its own size and type.
            keeps: What autograd keeps for backward.
            keeps_output: Keep the output too.
            passes_gradient: Backward hands the incoming gradient on where sizes agree (add, view).
            weights: Trainable parameters with the bytes an element in which backward writes the gradient.
            scratch: Temporary memory of the backward kernel.
            forward_scratch: Temporary memory of the forward kernel.
        """
        if forward_scratch != NOTHING:
            self.release(self.allocate(forward_scratch))
        out = Tensor(self.allocate(self.size(features, itemsize)), features, itemsize, tracked=False)
        trainable = [(weight, width) for weight, width in weights if weight.trainable]
        if not self.grad_enabled or not (trainable or any(tensor.tracked for tensor in inputs)):
            return out
        out.tracked = True
        kept = [*keeps, out.storage] if keeps_output else list(keeps)
        for storage in kept:
            storage.users += 1
        routes: list[tuple[object, Bytes | None]] = []
        for tensor in inputs:
            if tensor.tracked:
                own = self.size_of(tensor)
                routes.append((tensor.slot, None if passes_gradient and own == self.size_of(out) else own))
        self._nodes.append(_Node((out.slot,), kept, routes, trainable, scratch))
        return out

    def split(self, tensor: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """Return views of parts of a tensor; the caller's hold becomes one hold a part.

        Backward puts the parts' gradients together in new memory.
        """
        tensor.storage.users += len(widths) - 1
        parts = [Tensor(tensor.storage, width, tensor.itemsize, tensor.tracked) for width in widths]
        if tensor.tracked:
            slots = tuple(part.slot for part in parts)
            self._nodes.append(_Node(slots, [], [(tensor.slot, self.size_of(tensor))], [], NOTHING))
        return parts

    def view(self, tensor: Tensor, features: int) -> Tensor:
        """Return a part or another shape of the same memory; the caller's hold moves to the view."""
        return Tensor(tensor.storage, features, tensor.itemsize, tensor.tracked, tensor.slot)

    def cast(self, tensor: Tensor, itemsize: int) -> Tensor:
        """Return a copy in another type, or the tensor itself with one more hold."""
        if tensor.itemsize == itemsize:
            tensor.storage.users += 1
            return tensor
        return self.op(tensor.features, itemsize, [tensor])

    def parameter(self, elements: int, *, trainable: bool, matmul: bool = False, itemsize: int = 0) -> Weight:
        """Note a parameter of the block and return it."""
        weight = Weight(elements, trainable, itemsize or self.weight_bytes, matmul)
        self.weights.append(weight)
        return weight

    def weight_cast(self, weight: Weight) -> Storage | None:
        """Return autocast's copy of a weight, or None where it is used as it is.

        Autocast caches the copies of trainable weights until the forward pass ends; copies of frozen
        weights live only as long as something keeps them.
        """
        if weight.itemsize == self.compute_bytes:
            return None
        storage = self.allocate(Bytes(weight.elements * self.compute_bytes))
        self._recorder.copies(storage)
        if weight.trainable:
            storage.users += 1
            self._casts.append(storage)
        return storage

    # ---- results -------------------------------------------------------------------------------
    def finish(self, x: Tensor, y: Tensor) -> BlockMemory:
        """Run the backward pass from the output `y` to the input `x` and return what it all came to."""
        forward, returned = highest(self._seen), self._recorder.length
        self.release(x.storage)
        cached = sum(storage.size.fixed for storage in self._casts)
        for storage in self._casts:
            self.release(storage)
        saved = self.live - y.storage.size
        kept = {id(s): s for node in self._nodes for s in node.kept if s is not y.storage}
        self._seen.clear()
        output_gradient = self.size_of(y)
        self.release(y.storage)
        turned = self._recorder.length
        gradient = self._backward(y).get(x.slot)
        left = self.live
        gradients = sum(w.elements * self.gradient_bytes for w in self.weights if w.trainable)
        if not self.grad_enabled:
            gradients = 0
        input_gradient = self.size_of(x) if x.tracked else NOTHING
        expected = input_gradient + Bytes(0 if self.accumulating else gradients)
        assert left == expected, f"the backward pass leaves {left}, not {expected}"
        return BlockMemory(
            saved=saved,
            output=output_gradient,
            cached_casts=cached,
            forward=forward,
            backward=highest(self._seen) or (NOTHING,),
            gradients=gradients,
            input_gradient=input_gradient,
            weights=tuple(self.weights),
            program=self._recorder.program(
                returned=returned,
                turned=turned,
                source=x.storage,
                output=y.storage,
                cached=self._casts,
                gradient=gradient,
            ),
            kept_tensors=tuple(storage.size for storage in kept.values()),
        )

    def _backward(self, y: Tensor) -> dict[object, Storage]:
        """Run the nodes in reverse and return the gradients that nobody took: the input's."""
        if not y.tracked:
            return {}
        waiting: dict[object, Storage] = {y.slot: self.allocate(self.size_of(y))}
        for node in reversed(self._nodes):
            incoming = [waiting.pop(slot) for slot in node.slots if slot in waiting]
            assert incoming, "an operation's output reaches no gradient"
            for slot, storage in self._run(node, incoming):
                waiting[slot] = self._add(waiting[slot], storage) if slot in waiting else storage
        self._nodes.clear()
        return waiting

    def _add(self, there: Storage, new: Storage) -> Storage:
        """Add two gradients: in place, unless somebody else still reads the first."""
        if there.users == 1:
            self.release(new)
            return there
        total = self.allocate(there.size)
        self.release(there)
        self.release(new)
        return total

    def _run(self, node: _Node, incoming: list[Storage]) -> list[tuple[object, Storage]]:
        """Allocate the gradients of one operation, then free what it kept and what came in."""
        made: list[tuple[object, Storage]] = []
        for slot, size in node.routes:
            if size is None:
                incoming[0].users += 1
                made.append((slot, incoming[0]))
            else:
                made.append((slot, self.allocate(size)))
        raw = [
            (weight, width, self.allocate(Bytes(weight.elements * width))) for weight, width in node.weights
        ]
        if node.scratch != NOTHING:
            self.release(self.allocate(node.scratch))
        for storage in (*node.kept, *incoming):
            self.release(storage)
        for weight, width, storage in raw:
            self._collect(weight, width, storage)
        return made

    def _collect(self, weight: Weight, width: int, storage: Storage) -> None:
        """Turn a raw weight gradient into the parameter's: cast it, and add it where one exists."""
        if width != self.gradient_bytes:
            wide = self.allocate(Bytes(weight.elements * self.gradient_bytes))
            self.release(storage)
            storage = wide
        if self.accumulating:
            self.release(storage)
