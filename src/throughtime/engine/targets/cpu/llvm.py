"""The vocabulary in which CPU kernels are written: integers, addresses, vectors, masks and loops as LLVM IR.

A `Code` is one C function under construction. Its values read like Python numbers; a `Vector` has a method for each
name in the `llvm` column of the op table. Nothing here knows what a cell is, and nothing here assumes that a number is
finite: no fast-math flag is ever set, fused multiply-add is explicit, clamps select and so let NaN pass.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llvmlite
import llvmlite.binding as binding
from llvmlite import ir

from throughtime.engine.targets.cpu.machine import machine

I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
POINTER = ir.PointerType()


# ---------------------------------------------------------------------------------------------------------------------
# The machine


@functools.cache
def _target_machine() -> binding.TargetMachine:
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(
        cpu=machine().cpu, features=machine().features, opt=3, codemodel="jitdefault", reloc="pic", jit=True
    )


# ---------------------------------------------------------------------------------------------------------------------
# Scalars


class Int:
    """A 64-bit integer, a byte address included, in the code under construction."""

    __slots__ = ("code", "value")

    def __init__(self, code: Code, value: ir.Value) -> None:
        self.code, self.value = code, value

    def _with(self, operation: str, other: Any, swap: bool = False) -> Int:
        other = self.code.integer(other)
        left, right = (other, self) if swap else (self, other)
        return Int(self.code, getattr(self.code.builder, operation)(left.value, right.value))

    def __add__(self, other: Any) -> Int:
        return self if _is_number(other, 0) else self._with("add", other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Int:
        return self if _is_number(other, 0) else self._with("sub", other)

    def __rsub__(self, other: Any) -> Int:
        return self._with("sub", other, swap=True)

    def __mul__(self, other: Any) -> Int:
        return self if _is_number(other, 1) else self._with("mul", other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Int:
        return self._with("sdiv", other)

    def __mod__(self, other: Any) -> Int:
        return self._with("srem", other)

    def _compared(self, sign: str, other: Any) -> ir.Value:
        return self.code.builder.icmp_signed(sign, self.value, self.code.integer(other).value)

    def __lt__(self, other: Any) -> ir.Value:
        return self._compared("<", other)

    def __le__(self, other: Any) -> ir.Value:
        return self._compared("<=", other)

    def __gt__(self, other: Any) -> ir.Value:
        return self._compared(">", other)

    def __ge__(self, other: Any) -> ir.Value:
        return self._compared(">=", other)

    def equals(self, other: Any) -> ir.Value:
        """The condition that both are equal."""
        return self._compared("==", other)

    def differs(self, other: Any) -> ir.Value:
        """The condition that they are not equal."""
        return self._compared("!=", other)


def _is_number(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number


class Variable:
    """A place on the stack that LLVM turns into a register; `get` and `set` take and give one kind of value."""

    def __init__(self, code: Code, kind: ir.Type, wrap: Callable[[Code, ir.Value], Any]) -> None:
        self.code, self.wrap = code, wrap
        with code.builder.goto_entry_block():
            self.place = code.builder.alloca(kind)
        self.kind = kind

    def get(self) -> Any:
        """The value it holds here."""
        return self.wrap(self.code, self.code.builder.load(self.place, typ=self.kind))

    def set(self, value: Any) -> None:
        """Let it hold another value from here on."""
        self.code.builder.store(value.value, self.place)


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


@dataclass(frozen=True)
class Format:
    """A floating-point format: its IR type, and the constants that its elementary functions need."""

    name: str
    bytes: int
    mantissa: int
    bias: int
    magic: float
    ln2_high: float
    ln2_low: float
    exp_tail: tuple[float, ...]  # (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2, near-minimax, lowest power first
    log_tail: tuple[float, ...]  # (log((1 + s) / (1 - s)) - 2 s) / s^3 in s^2, for mantissas in [sqrt(1/2), sqrt(2)]
    exp_high: float
    exp_low: float

    @property
    def type(self) -> ir.Type:
        """The scalar type in IR."""
        return ir.FloatType() if self.bytes == 4 else ir.DoubleType()

    @property
    def integer(self) -> ir.IntType:
        """The integer type of the same width."""
        return ir.IntType(8 * self.bytes)


# fmt: off
F32 = Format("f32", 4, 23, 127, 12582912.0, 0.693145751953125, 1.42860682030941723212e-6,
             (0.5, 0.16666576989698776, 0.041666554617204574, 0.0083631790527225774, 0.0013926183587713495),
             (0.66666666554042012, 0.40000122211810649, 0.28550778633191965, 0.23331614471843499),
             89.5, -104.5)
F64 = Format("f64", 8, 52, 1023, 6755399441055744.0, 6.93147180369123816490e-01, 1.90821492927058770002e-10,
             (0.5, 0.16666666666666671, 0.04166666666666667, 0.0083333333333261351, 0.0013888888888883748,
              0.00019841269874820625, 2.4801587325547741e-5, 2.7557255400206424e-6, 2.7557273643110295e-7,
              2.5105217004720745e-8, 2.0914686968086877e-9),
             (0.66666666666666666, 0.40000000000000883, 0.28571428570799785, 0.22222222392581045, 0.18181795547521136,
              0.15386244737621667, 0.13268638369266824, 0.13088034850927554),
             710.5, -746.0)
# fmt: on
FORMATS = {4: F32, 8: F64}


class Vector:
    """As many numbers as the machine holds in one register; its methods are the `llvm` column of the op table."""

    __slots__ = ("code", "value")

    def __init__(self, code: Code, value: ir.Value) -> None:
        self.code, self.value = code, value

    def _of(self, value: ir.Value) -> Vector:
        return Vector(self.code, value)

    def _lift(self, other: Any) -> ir.Value:
        return other.value if isinstance(other, Vector) else self.code.fill(other).value

    def add(self, other: Any) -> Vector:
        """Sum."""
        return self._of(self.code.builder.fadd(self.value, self._lift(other)))

    def sub(self, other: Any) -> Vector:
        """Difference."""
        return self._of(self.code.builder.fsub(self.value, self._lift(other)))

    def mul(self, other: Any) -> Vector:
        """Product."""
        return self._of(self.code.builder.fmul(self.value, self._lift(other)))

    def div(self, other: Any) -> Vector:
        """Quotient, correctly rounded."""
        return self._of(self.code.builder.fdiv(self.value, self._lift(other)))

    def fma(self, factor: Any, addend: Any) -> Vector:
        """self * factor + addend, rounded once."""
        operands = [self.value, self._lift(factor), self._lift(addend)]
        return self._of(self.code.intrinsic("fma", operands))

    def neg(self) -> Vector:
        """The same with the other sign."""
        return self._of(self.code.builder.fneg(self.value))

    def abs(self) -> Vector:
        """Magnitude."""
        return self._of(self.code.intrinsic("fabs", [self.value]))

    def sqrt(self) -> Vector:
        """Square root; NaN below zero."""
        return self._of(self.code.intrinsic("sqrt", [self.value]))

    def less(self, other: Any) -> Condition:
        """Where self < other; nowhere that either is NaN."""
        return Condition(self.code, self.code.builder.fcmp_ordered("<", self.value, self._lift(other)))

    def less_equal(self, other: Any) -> Condition:
        """Where self <= other; nowhere that either is NaN."""
        return Condition(self.code, self.code.builder.fcmp_ordered("<=", self.value, self._lift(other)))

    def is_nan(self) -> Condition:
        """Where self is not a number."""
        return Condition(self.code, self.code.builder.fcmp_unordered("uno", self.value, self.value))

    def clamp(self, low: float, high: float) -> Vector:
        """Within [low, high]; NaN stays NaN, since both comparisons are false for it."""
        raised = self.less(low).where(self.code.fill(low), self)
        return self.code.fill(high).less(raised).where(self.code.fill(high), raised)

    def sign(self) -> Vector:
        """-1, 0 or 1; NaN stays NaN."""
        below = self.less(0.0).where(self.code.fill(-1.0), self)
        return self.code.fill(0.0).less(self).where(self.code.fill(1.0), below)

    def relu(self) -> Vector:
        """max(self, 0); NaN stays NaN."""
        return self.less_equal(0.0).where(self.code.fill(0.0), self)

    def maximum(self, other: Any) -> Vector:
        """The larger; NaN if either is."""
        other = self._of(self._lift(other))
        return self.is_nan().where(self, other.less(self).where(self, other))

    def minimum(self, other: Any) -> Vector:
        """The smaller; NaN if either is."""
        other = self._of(self._lift(other))
        return self.is_nan().where(self, self.less(other).where(self, other))

    def polynomial(self, coefficients: Sequence[float]) -> Vector:
        """The sum of coefficients[i] * self**i by Horner's rule."""
        total = self.code.fill(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            total = total.fma(self, coefficient)
        return total

    def _split_power(self) -> tuple[ir.Value, Vector]:
        """n (an integer vector) and r with self = n ln 2 + r, |r| <= ln 2 / 2, for moderate self.

        Rounds by adding a magic constant: converting NaN to an integer would be poison.
        """
        code, form = self.code, self.code.format
        shifted = self.fma(1.4426950408889634, form.magic)
        whole = shifted.sub(form.magic)
        r = whole.fma(-form.ln2_high, self)
        r = whole.fma(-form.ln2_low, r)
        return code.builder.bitcast(shifted.value, code.integer_vector), r

    def _power_of_two(self, n: ir.Value) -> Vector:
        code, form = self.code, self.code.format
        biased = code.builder.add(n, code.fill_integer(form.bias))
        shifted = code.builder.shl(biased, code.fill_integer(form.mantissa))
        return self._of(code.builder.bitcast(shifted, code.vector))

    def _exp_moderate(self) -> Vector:
        """exp, for arguments that neither overflow nor become subnormal."""
        n, r = self._split_power()
        tail = r.polynomial(self.code.format.exp_tail)
        return self._power_of_two(n).mul(r.fma(tail, 1.0).fma(r, 1.0))

    def exp(self) -> Vector:
        """The exponential over the whole range: inf above, gradual underflow below."""
        code, form = self.code, self.code.format
        x = self.clamp(form.exp_low, form.exp_high)
        n, r = x._split_power()
        value = r.fma(r.polynomial(form.exp_tail), 1.0).fma(r, 1.0)
        magic = code.builder.bitcast(code.fill(form.magic).value, code.integer_vector)
        n = code.builder.sub(n, magic)
        half = code.builder.ashr(n, code.fill_integer(1))
        rest = code.builder.sub(n, half)
        return value.mul(self._power_of_two(half)).mul(self._power_of_two(rest))

    def sigmoid(self) -> Vector:
        """1 / (1 + exp(-self))."""
        low, high = (-87.0, 88.75) if self.code.itemsize == 4 else (-708.0, 709.8)
        e = self.neg().clamp(low, high)._exp_moderate()  # at `high` the power of two is inf: sigmoid(-inf) is 0 exactly
        return self.code.fill(1.0).div(e.add(1.0))

    def tanh(self) -> Vector:
        """m / (m + 2), m = exp(2 self) - 1 without cancellation, so that small arguments keep their digits."""
        doubled = self.clamp(-20.0, 20.0).mul(2.0)
        n, r = doubled._split_power()
        scale = self._power_of_two(n)
        growth = (r.mul(r)).fma(r.polynomial(self.code.format.exp_tail), r)
        m = scale.fma(growth, scale.sub(1.0))
        return m.div(m.add(2.0))

    def log(self) -> Vector:
        """The natural logarithm: -inf at 0, NaN below, inf at inf."""
        code, form, build = self.code, self.code.format, self.code.builder
        smallest = 2.0 ** (1 - form.bias)
        lift = 2.0 ** (form.mantissa + 1)
        tiny = self.less(smallest)
        x = tiny.where(self.mul(lift), self)
        bits = build.bitcast(x.value, code.integer_vector)
        offset = build.sub(bits, code.fill_integer(_bits_of_root_half(form)))
        exponent = build.ashr(offset, code.fill_integer(form.mantissa))
        mantissa = build.sub(bits, build.shl(exponent, code.fill_integer(form.mantissa)))
        e = self._of(build.sitofp(exponent, code.vector))
        e = tiny.where(e.sub(float(form.mantissa + 1)), e)
        f = self._of(build.bitcast(mantissa, code.vector)).sub(1.0)
        s = f.div(f.add(2.0))
        z = s.mul(s)
        # log(1 + f) = 2 s + s z tail, written around f so that arguments near one keep their digits: 2 s = f - s f
        correction = s.mul(z.mul(z.polynomial(form.log_tail)).sub(f))
        value = e.fma(form.ln2_high, f.add(e.fma(form.ln2_low, correction)))
        value = self.less_equal(0.0).where(
            self.less(0.0).where(code.fill(float("nan")), code.fill(float("-inf"))), value
        )
        infinite = code.fill(float("inf")).less_equal(self)
        return self.is_nan().where(self, infinite.where(self, value))

    def log1p(self) -> Vector:
        """log(1 + self), the rounding of the sum put right (Kahan)."""
        u = self.add(1.0)
        near = self.code.fill(1.0).less_equal(u).both(u.less_equal(1.0))
        exact = u.log().mul(self.div(u.sub(1.0)))
        infinite = self.code.fill(float("inf")).less_equal(self)
        return near.where(self, infinite.where(self, exact))


def _bits_of_root_half(form: Format) -> int:
    small, large = ("<f", "<i") if form.bytes == 4 else ("<d", "<q")
    bits: int = struct.unpack(large, struct.pack(small, 0.5**0.5))[0]
    return bits


class Condition:
    """A truth value in every lane."""

    __slots__ = ("code", "value")

    def __init__(self, code: Code, value: ir.Value) -> None:
        self.code, self.value = code, value

    def where(self, a: Any, b: Any) -> Vector:
        """`a` in the lanes where it holds, `b` in the others."""
        a, b = (v if isinstance(v, Vector) else self.code.fill(v) for v in (a, b))
        return Vector(self.code, self.code.builder.select(self.value, a.value, b.value))

    def both(self, other: Condition) -> Condition:
        """Where both hold."""
        return Condition(self.code, self.code.builder.and_(self.value, other.value))


# ---------------------------------------------------------------------------------------------------------------------
# Code


@dataclass(frozen=True)
class Source:
    """LLVM IR of one function, the fields of its frame that it must find set, and those that it sets itself."""

    text: str
    needs: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()


class Code:
    """One C function under construction; every argument is a 64-bit integer or address, and it returns nothing."""

    def __init__(self, name: str, arguments: Sequence[str], itemsize: int) -> None:
        self.name = name
        self.format = FORMATS[itemsize]
        self.itemsize = itemsize
        self.lanes = machine().lanes(itemsize)
        self.vector = ir.VectorType(self.format.type, self.lanes)
        self.integer_vector = ir.VectorType(self.format.integer, self.lanes)
        self.module = ir.Module(name)
        self.module.triple = binding.get_process_triple()
        function_type = ir.FunctionType(ir.VoidType(), [I64] * len(arguments))
        self.function = ir.Function(self.module, function_type, name)
        self.function.attributes.add("nounwind")
        self.function.attributes.alignstack = 64  # sums that do not fit in registers should not straddle cache lines
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.arguments = {name: Int(self, arg) for name, arg in zip(arguments, self.function.args, strict=True)}
        self.needs: set[str] = set()  # fields of a frame that are read here before they are set here
        self.sets: set[str] = set()

    def __getitem__(self, name: str) -> Int:
        return self.arguments[name]

    def __getattr__(self, name: str) -> Int:
        try:
            argument: Int = self.__dict__["arguments"][name]
            return argument
        except KeyError:
            raise AttributeError(f"{name} is neither an argument of {self.__dict__.get('name')} nor a word") from None

    # integers and control

    def integer(self, value: Any) -> Int:
        """An integer constant, or the Int itself."""
        return value if isinstance(value, Int) else Int(self, ir.Constant(I64, value))

    def integer_variable(self, value: Any) -> Variable:
        """An integer that changes."""
        variable = Variable(self, I64, Int)
        variable.set(self.integer(value))
        return variable

    def minimum(self, a: Any, b: Any) -> Int:
        """The smaller integer."""
        a, b = self.integer(a), self.integer(b)
        return Int(self, self.builder.select(a < b, a.value, b.value))

    def maximum(self, a: Any, b: Any) -> Int:
        """The larger integer."""
        a, b = self.integer(a), self.integer(b)
        return Int(self, self.builder.select(a > b, a.value, b.value))

    def choose(self, condition: ir.Value, a: Any, b: Any) -> Int:
        """`a` if the condition holds, else `b`."""
        return Int(self, self.builder.select(condition, self.integer(a).value, self.integer(b).value))

    @contextmanager
    def loop(self, stop: Any, start: Any = 0, step: Any = 1) -> Iterator[Int]:
        """Count from start to stop, exclusive."""
        build = self.builder
        stop, start, step = self.integer(stop), self.integer(start), self.integer(step)
        before = build.block
        body, after = build.append_basic_block("loop"), build.append_basic_block("after")
        build.cbranch(start < stop, body, after)
        build.position_at_end(body)
        count = build.phi(I64)
        count.add_incoming(start.value, before)
        i = Int(self, count)
        yield i
        following = i + step
        count.add_incoming(following.value, build.block)
        build.cbranch(following < stop, body, after)
        build.position_at_end(after)

    @contextmanager
    def when(self, condition: ir.Value) -> Iterator[None]:
        """Only if the condition holds."""
        with self.builder.if_then(condition):
            yield

    @contextmanager
    def forever(self) -> Iterator[Callable[[ir.Value], None]]:
        """A loop left by calling what it yields with a condition."""
        build = self.builder
        body, after = build.append_basic_block("again"), build.append_basic_block("left")
        build.branch(body)
        build.position_at_end(body)

        def leave_when(condition: ir.Value) -> None:
            onward = build.append_basic_block("onward")
            build.cbranch(condition, after, onward)
            build.position_at_end(onward)

        yield leave_when
        build.branch(body)
        build.position_at_end(after)

    def call(self, address: Int, arguments: Sequence[Any]) -> None:
        """Call the C function of integers at an address."""
        values = [self.integer(argument).value for argument in arguments]
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(values))
        self.builder.call(self.builder.inttoptr(address.value, kind.as_pointer()), values)

    def call_for_number(self, address: Int) -> Int:
        """Call the C function without arguments at an address, which returns an int."""
        kind = ir.FunctionType(I32, [])
        number = self.builder.call(self.builder.inttoptr(address.value, kind.as_pointer()), [])
        return Int(self, self.builder.sext(number, I64))

    # memory

    def pointer(self, address: Int, offset: int = 0) -> ir.Value:
        """An address as a pointer, a constant number of bytes on."""
        return self.builder.inttoptr((address + offset).value, POINTER)

    def load_integer(self, address: Int, offset: int = 0) -> Int:
        """The 64-bit integer at an address."""
        return Int(self, self.builder.load(self.pointer(address, offset), align=8, typ=I64))

    def store_integer(self, value: Any, address: Int, offset: int = 0) -> None:
        """Write a 64-bit integer."""
        self.builder.store(self.integer(value).value, self.pointer(address, offset), align=8)

    def load_byte(self, address: Int) -> Int:
        """The byte at an address, as an integer."""
        byte = self.builder.load(self.pointer(address), align=1, typ=I8)
        return Int(self, self.builder.zext(byte, I64))

    def atomic_add(self, address: Int, value: int) -> None:
        """Add to a shared integer; what was written before is seen by whoever reads the sum with `load_shared`."""
        self.builder.atomic_rmw("add", self.pointer(address), self.integer(value).value, "acq_rel")

    def load_shared(self, address: Int) -> Int:
        """A shared integer, and with it whatever its writer wrote before."""
        return Int(self, self.builder.load_atomic(self.pointer(address), "acquire", 8, typ=I64))

    def store_shared(self, value: Any, address: Int) -> None:
        """Write a shared integer after everything written so far."""
        self.builder.atomic_rmw("xchg", self.pointer(address), self.integer(value).value, "acq_rel")

    def pause(self) -> None:
        """Tell the core that this is a waiting loop."""
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            self.builder.call(self._declared("llvm.x86.sse2.pause", kind), [])

    def load(self, address: Int, offset: int = 0, mask: ir.Value | None = None) -> Vector:
        """The vector at an address; lanes outside the mask are not touched and read as zero."""
        pointer = self.pointer(address, offset)
        if mask is None:
            return Vector(self, self.builder.load(pointer, align=self.itemsize, typ=self.vector))
        load = self._masked("load", self.vector, [POINTER, I32, self.vector_mask_type, self.vector])
        align = ir.Constant(I32, self.itemsize)
        return Vector(self, self.builder.call(load, [pointer, align, mask, ir.Constant(self.vector, None)]))

    def store(
        self, value: Vector, address: Int, offset: int = 0, mask: ir.Value | None = None, streaming: bool = False
    ) -> None:
        """Write a vector; lanes outside the mask stay as they are. `streaming` goes past the caches (aligned only)."""
        pointer = self.pointer(address, offset)
        if mask is not None:
            store = self._masked("store", ir.VoidType(), [self.vector, POINTER, I32, self.vector_mask_type])
            self.builder.call(store, [value.value, pointer, ir.Constant(I32, self.itemsize), mask])
            return
        align = self.lanes * self.itemsize if streaming else self.itemsize
        written = self.builder.store(value.value, pointer, align=align)
        if streaming:
            written.set_metadata("nontemporal", self.module.add_metadata([ir.Constant(I32, 1)]))

    def prefetch(self, address: Int, offset: int = 0, write: bool = False, locality: int = 3) -> None:
        """Ask for a cache line that will be needed."""
        kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
        function = self._declared("llvm.prefetch.p0", kind)
        flags = [ir.Constant(I32, int(write)), ir.Constant(I32, locality), ir.Constant(I32, 1)]
        self.builder.call(function, [self.pointer(address, offset), *flags])

    def broadcast(self, address: Int, offset: int = 0) -> Vector:
        """One number from memory in every lane."""
        number = self.builder.load(self.pointer(address, offset), align=self.itemsize, typ=self.format.type)
        return self._splat(number, self.vector)

    def copy_number(self, source: Int, target: Int) -> None:
        """Copy one number."""
        number = self.builder.load(self.pointer(source), align=self.itemsize, typ=self.format.type)
        self.builder.store(number, self.pointer(target), align=self.itemsize)

    def add_number(self, source: Int, target: Int) -> None:
        """Add one number to another."""
        kind = {"align": self.itemsize, "typ": self.format.type}
        number = self.builder.load(self.pointer(source), **kind)
        total = self.builder.fadd(self.builder.load(self.pointer(target), **kind), number)
        self.builder.store(total, self.pointer(target), align=self.itemsize)

    def zero_number(self, target: Int) -> None:
        """Write one zero."""
        self.builder.store(self._constant(0.0), self.pointer(target), align=self.itemsize)

    def store_sum(self, value: Vector, target: Int) -> None:
        """Write the sum of a vector's numbers, added in pairs."""
        numbers = [self.builder.extract_element(value.value, ir.Constant(I32, i)) for i in range(self.lanes)]
        while len(numbers) > 1:
            half = len(numbers) // 2
            numbers = [self.builder.fadd(numbers[i], numbers[i + half]) for i in range(half)]
        self.builder.store(numbers[0], self.pointer(target), align=self.itemsize)

    # vectors

    def fill(self, number: float) -> Vector:
        """One constant in every lane."""
        return Vector(self, ir.Constant(self.vector, [self._constant(float(number))] * self.lanes))

    def _constant(self, number: float) -> ir.Constant:
        return ir.Constant(self.format.type, number)

    def fill_integer(self, number: int) -> ir.Constant:
        """One integer of the format's width in every lane."""
        return ir.Constant(self.integer_vector, [ir.Constant(self.format.integer, number)] * self.lanes)

    def vector_variable(self, value: Vector | None = None) -> Variable:
        """A vector that changes; zero at first unless given."""
        variable = Variable(self, self.vector, Vector)
        variable.set(self.fill(0.0) if value is None else value)
        return variable

    @property
    def vector_mask_type(self) -> ir.VectorType:
        """The type of a mask."""
        return ir.VectorType(I1, self.lanes)

    def first(self, count: Int) -> ir.Value:
        """The mask of the first `count` lanes."""
        number = self.builder.trunc(self.minimum(count, self.lanes).value, I32)
        lanes = ir.VectorType(I32, self.lanes)
        places = ir.Constant(lanes, [ir.Constant(I32, i) for i in range(self.lanes)])
        return self.builder.icmp_signed("<", places, self._splat(number, lanes).value)

    def _splat(self, number: ir.Value, kind: ir.VectorType) -> Vector:
        zero = ir.Constant(I32, 0)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, zero)
        places = ir.Constant(ir.VectorType(I32, self.lanes), [zero] * self.lanes)
        return Vector(self, self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), places))

    # intrinsics and the finished text

    def intrinsic(self, name: str, operands: Sequence[ir.Value]) -> ir.Value:
        """An LLVM intrinsic on vectors of this code's format."""
        kind = ir.FunctionType(self.vector, [self.vector] * len(operands))
        function = self._declared(f"llvm.{name}.v{self.lanes}{self.format.name}", kind)
        return self.builder.call(function, operands)

    def _masked(self, name: str, returned: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        return self._declared(
            f"llvm.masked.{name}.v{self.lanes}{self.format.name}.p0", ir.FunctionType(returned, arguments)
        )

    def _declared(self, name: str, kind: ir.FunctionType) -> ir.Function:
        known = self.module.globals.get(name)
        return known if known is not None else ir.Function(self.module, kind, name)

    def text(self) -> str:
        """The finished function as LLVM IR."""
        if not self.builder.block.is_terminated:
            self.builder.ret_void()
        return str(self.module)

    def source(self, text: str) -> Source:
        """The finished text, with the fields of a frame that it reads and sets."""
        return Source(text, tuple(sorted(self.needs)), tuple(sorted(self.sets)))


def optimised(text: str) -> binding.ModuleRef:
    """LLVM IR parsed, verified and optimised; vectors and loops stay as they were written."""
    module = binding.parse_assembly(text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_unrolling = False
    builder = binding.create_pass_builder(_target_machine(), options)
    builder.getModulePassManager().run(module, builder)
    return module


def compiled(text: str) -> bytes:
    """LLVM IR to a relocatable object for this machine."""
    emitted: bytes = _target_machine().emit_object(optimised(text))
    return emitted


def assembly(text: str) -> str:
    """LLVM IR to this machine's assembly, for reading."""
    listing: str = _target_machine().emit_assembly(optimised(text))
    return listing


_loaded: list[Any] = []  # an engine owns the code it has loaded; dropping it would pull the code from under callers


def load(image: bytes, name: str) -> int:
    """Load an object into the process and return the address of a function."""
    empty = binding.parse_assembly("")
    empty.triple = binding.get_process_triple()
    engine = binding.create_mcjit_compiler(empty, _target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(image))
    engine.finalize_object()
    _loaded.append(engine)
    address: int = engine.get_function_address(name)
    return address


def fingerprint() -> str:
    """What an object depends on besides its own source: the compiler and the machine."""
    parts = [llvmlite.__version__, binding.llvm_version_info, binding.get_process_triple(), machine()]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
