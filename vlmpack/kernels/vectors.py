"""Two steps of resampling in vector instructions that the compiler does not find by itself.

    weigh_block   a block of levels weighed from lines: pairs of 16-bit numbers, multiplied and added at once
    turn_block    16 x 16 bytes turned on their side in registers

Compilers widen levels and weights to 32 bits and multiply those, which takes Intel's processors twice as long
for half as many. Here a weight of 22 fractional bits is split in two parts of at most 16 bits, whose products
are exact, so that the sums are the same integers. docs/experiments.md has the gains.

Source: Intel, "Intrinsics guide": pmaddwd, packssdw and packuswb, which AVX2 and AVX-512 have. Elsewhere
`VECTOR_BYTES` is 0 and the caller has a loop. Turning is a network of interleavings for any machine.

Shapes: N output lines, K taps, an even number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

if TYPE_CHECKING:
    from numba.core.typing.templates import Signature

WEIGHT_BITS: Final = 22
"""Fractional bits of a weight."""
LOW_BITS: Final = 15
"""Bits of a weight's low part."""
MAX_TAPS: Final = 256
"""With more, the low parts' sum could overflow: 256 x 255 x 2^15 is just under 2^31."""


def _vector_bytes() -> int:
    """Return the bytes of a vector of numba's target, 0 if it lacks the instructions."""
    features = set((config.CPU_FEATURES or get_host_cpu_features()).split(","))
    if config.DISABLE_JIT or "+avx2" not in features:
        return 0
    return 64 if "+avx512bw" in features else 32


VECTOR_BYTES: Final[int] = _vector_bytes()
"""Levels that `weigh_block` makes at once: 64 or 32; 0 where it must not be called."""
CAN_TURN: Final[bool] = not config.DISABLE_JIT
"""Whether `turn_block` may be called."""

TURN_BYTES: Final[int] = 32 if VECTOR_BYTES else 16
"""Bytes of a row that `turn_block` turns at once."""

_LANE: Final = 16
"""Bytes of a lane; the instructions do not reach across lanes, and what they mix they unmix again."""
_INSTRUCTIONS: Final = {
    64: ("llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packuswb.512"),
    32: ("llvm.x86.avx2.pmadd.wd", "llvm.x86.avx2.packssdw", "llvm.x86.avx2.packuswb"),
}
_MADD, _PACK_INTS, _PACK_SHORTS = range(3)
_BYTE, _INT = ir.IntType(8), ir.IntType(32)
_BYTES = ir.VectorType(_BYTE, VECTOR_BYTES)
_SHORTS = ir.VectorType(ir.IntType(16), VECTOR_BYTES // 2)
_INTS = ir.VectorType(_INT, VECTOR_BYTES // 4)


@intrinsic
def weigh_block(
    typing_context: Any,  # noqa: ARG001 - numba passes it
    source: Any,
    at_NK: Any,
    split_NK: Any,
    n: Any,
    shift: Any,
    out: Any,
    to: Any,
) -> Any:
    """Write `VECTOR_BYTES` levels of one output line; the arguments are for numba, this is how it is called.

    Args:
        typing_context: numba's.
        source: uint8, flat.
        at_NK: int64 [N, K], C-contiguous: where the lines of line n's taps begin in `source`.
        split_NK: int32 [N, K], C-contiguous, from `split_weights`.
        n: The line.
        shift: Bytes from the beginnings of lines at which the block begins.
        out: uint8, flat, the output.
        to: Where the line begins in `out`.
    """
    return types.void(source, at_NK, split_NK, n, shift, out, to), _emit_weigh


@intrinsic
def weigh_block_coarse(
    typing_context: Any,  # noqa: ARG001 - numba passes it
    source: Any,
    at_NK: Any,
    split_NK: Any,
    n: Any,
    shift: Any,
    out: Any,
    to: Any,
) -> Any:
    """Do the same for a line whose weights have low parts of 0.

    Args:
        typing_context: As for `weigh_block`, and so are the others.
        source: Likewise.
        at_NK: Likewise.
        split_NK: Likewise.
        n: Likewise.
        shift: Likewise.
        out: Likewise.
        to: Likewise.
    """
    return types.void(source, at_NK, split_NK, n, shift, out, to), _emit_weigh_coarse


@intrinsic
def turn_block(
    typing_context: Any,  # noqa: ARG001 - numba passes it
    source: Any,
    at_16: Any,
    shift: Any,
    out: Any,
    to_T: Any,
    out_shift: Any,
) -> Any:
    """Write 16 rows of `TURN_BYTES` bytes as columns; the arguments are for numba, this is how it is called.

    Args:
        typing_context: numba's.
        source: uint8, flat.
        at_16: int64 [16], where the rows begin in `source`.
        shift: Bytes from there at which the block begins.
        out: uint8, flat, the output.
        to_T: int64 [TURN_BYTES], where the new rows, of 16 bytes, begin in `out`.
        out_shift: Bytes from there at which they are written.
    """
    return types.void(source, at_16, shift, out, to_T, out_shift), _emit_turn


@intrinsic
def turn_block_back(
    typing_context: Any,  # noqa: ARG001 - numba passes it
    source: Any,
    at_16: Any,
    shift: Any,
    out: Any,
    to_16: Any,
    out_shift: Any,
) -> Any:
    """Do the same with rows of 16 bytes; more picture rows at once would fall out of the first cache.

    Args:
        typing_context: As for `turn_block`, and so are the others.
        source: Likewise.
        at_16: Likewise.
        shift: Likewise.
        out: Likewise.
        to_16: Likewise.
        out_shift: Likewise.
    """
    return types.void(source, at_16, shift, out, to_16, out_shift), _emit_turn_back


class _Arguments:
    """The values that a call passes, and what lies in its arrays."""

    def __init__(self, context: Any, builder: Any, signature: Signature, values: list[Any]) -> None:
        self.context, self.builder, self.types, self.values = context, builder, signature.args, values

    def address(self, number: int, index: Any) -> Any:
        """Return the address of one element of a flat array."""
        array = self.context.make_array(self.types[number])(self.context, self.builder, self.values[number])
        return self.builder.gep(array.data, [index])

    def num_columns(self, number: int) -> Any:
        """Return K of an array [N, K]."""
        array = self.context.make_array(self.types[number])(self.context, self.builder, self.values[number])
        return self.builder.extract_value(array.shape, 1)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    value = builder.load(builder.bitcast(address, kind.as_pointer()))
    value.align = 1
    return value


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = 1


def _places(order: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_INT, len(order)), order)


def _interleave(builder: Any, one: Any, other: Any) -> tuple[Any, Any]:
    """Return the lower and the upper halves of both vectors' lanes, byte after byte in turn."""
    num = one.type.count
    halves = []
    for half in (0, _LANE // 2):
        first = [lane + half + i for lane in range(0, num, _LANE) for i in range(_LANE // 2)]
        order = [place for at in first for place in (at, num + at)]
        halves.append(builder.shuffle_vector(one, other, _places(order)))
    return halves[0], halves[1]


def _emit_turn(context: Any, builder: Any, signature: Signature, values: list[Any]) -> Any:
    _emit_square(_Arguments(context, builder, signature, values), TURN_BYTES)
    return context.get_dummy_value()


def _emit_turn_back(context: Any, builder: Any, signature: Signature, values: list[Any]) -> Any:
    _emit_square(_Arguments(context, builder, signature, values), _LANE)
    return context.get_dummy_value()


def _emit_square(call: _Arguments, num_bytes: int) -> None:
    builder, index = call.builder, ir.IntType(64)

    def place(number: int, k: int, array: int, shift: int) -> Any:
        start = builder.load(call.address(number, index(k)))
        return call.address(array, builder.add(start, call.values[shift]))

    rows = [_load(builder, place(1, k, 0, 2), ir.VectorType(_BYTE, num_bytes)) for k in range(16)]
    for _ in range(4):  # dealing 256 bytes out in two halves, four times, turns the square
        rows = [row for k in range(8) for row in _interleave(builder, rows[k], rows[k + 8])]
    for lane in range(0, num_bytes, _LANE):
        order = _places(list(range(lane, lane + _LANE)))
        for k in range(16):
            _store(builder, builder.shuffle_vector(rows[k], rows[k], order), place(4, lane + k, 3, 5))


def _instruction(builder: Any, number: int, result: Any, one: Any, other: Any) -> Any:
    kind = ir.FunctionType(result, [one.type, other.type])
    name = _INSTRUCTIONS[VECTOR_BYTES][number]
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [one, other])


def _everywhere(builder: Any, value: Any) -> Any:
    """Return a pair of weights, as 32 bits, in all places of a vector of 16-bit numbers."""
    first = builder.insert_element(ir.Constant(_INTS, ir.Undefined), value, _INT(0))
    return builder.bitcast(builder.shuffle_vector(first, first, _places([0] * _INTS.count)), _SHORTS)


def _add_pair(call: _Arguments, tap: Any, sums: list[Any]) -> list[Any]:
    """Return the sums with two more taps in them: four vectors of high parts, and four of low, or none."""
    builder, n, shift = call.builder, *call.values[3:5]
    next_tap = builder.add(tap, tap.type(1))
    lines = []
    for k in (tap, next_tap):
        start = builder.load(call.address(1, builder.add(builder.mul(n, call.num_columns(1)), k)))
        lines.append(_load(builder, call.address(0, builder.add(start, shift)), _BYTES))
    zero = ir.Constant(_BYTES, None)
    pairs = [
        builder.bitcast(part, _SHORTS)
        for mixed in _interleave(builder, *lines)
        for part in _interleave(builder, mixed, zero)
    ]
    products = []
    for k in (tap, next_tap)[: len(sums) // 4]:
        at = builder.add(builder.mul(n, call.num_columns(2)), k)
        weight = _everywhere(builder, builder.load(call.address(2, at)))
        products += [_instruction(builder, _MADD, _INTS, pair, weight) for pair in pairs]
    return [builder.add(total, product) for total, product in zip(sums, products, strict=True)]


def _emit_weigh(context: Any, builder: Any, signature: Signature, values: list[Any]) -> Any:
    _emit_sums(_Arguments(context, builder, signature, values), (0, 1 << (WEIGHT_BITS - 1)))
    return context.get_dummy_value()


def _emit_weigh_coarse(context: Any, builder: Any, signature: Signature, values: list[Any]) -> Any:
    _emit_sums(_Arguments(context, builder, signature, values), (1 << (WEIGHT_BITS - LOW_BITS - 1),))
    return context.get_dummy_value()


def _emit_sums(call: _Arguments, begin_with: tuple[int, ...]) -> None:
    """Write one block of levels; the numbers are what the sums of high, and of low parts begin with."""
    if not VECTOR_BYTES:
        return
    builder, index = call.builder, ir.IntType(64)
    begin = [ir.Constant(_INTS, [value] * _INTS.count) for value in begin_with for _ in range(4)]
    kept = [cgutils.alloca_once_value(builder, total) for total in begin]
    # A loop even where there are four taps: without, LLVM takes apart multiplying and adding to a sum.
    with cgutils.for_range_slice(builder, index(0), call.num_columns(2), index(2), inc=True) as (tap, _):
        sums = _add_pair(call, tap, [builder.load(place) for place in kept])
        for place, total in zip(kept, sums, strict=True):
            builder.store(total, place)
    sums = [builder.load(place) for place in kept]
    to = builder.add(call.values[6], call.values[4])
    _store(builder, _levels(builder, sums[:4], sums[4:]), call.address(5, to))


def _levels(builder: Any, sums: list[Any], lows: list[Any]) -> Any:
    """Return the sums as levels; packing holds them within 16 bits, then within 0 to 255."""
    if lows:
        low_bits = ir.Constant(_INTS, [LOW_BITS] * _INTS.count)
        carried = [builder.ashr(low, low_bits) for low in lows]
        sums = [builder.add(high, low) for high, low in zip(sums, carried, strict=True)]
    rest = ir.Constant(_SHORTS, [WEIGHT_BITS - LOW_BITS] * _SHORTS.count)
    shorts = [
        builder.ashr(_instruction(builder, _PACK_INTS, _SHORTS, *sums[i : i + 2]), rest) for i in (0, 2)
    ]
    return _instruction(builder, _PACK_SHORTS, _BYTES, *shorts)
