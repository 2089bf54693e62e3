"""Vectors of a fixed width for functions compiled by Numba: LLVM keeps them in registers.

Numba vectorises plain loops over taps and channels badly: they run at a third of this (docs/performance.md). The
functions below work inside `numba.njit` alone. Memory is given as an address (int) and an index in elements.
"""
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model


class Vector(types.Type):
    """`width` floating point numbers of type `dtype`."""

    def __init__(self, dtype: types.Float, width: int) -> None:
        super().__init__(name=f'Vector({dtype}, {width})')
        self.dtype, self.width = dtype, width


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector: Vector) -> None:
        super().__init__(manager, vector, _llvm(vector))


def _llvm(vector: Vector) -> ir.VectorType:
    return ir.VectorType(ir.FloatType() if vector.dtype is types.float32 else ir.DoubleType(), vector.width)


def _call(builder, name, result, *args):
    """Call LLVM's intrinsic `name`, overloaded for the type of the last argument."""
    vector = args[-1].type
    name = f'llvm.{name}.v{vector.count}f{32 if vector.element == ir.FloatType() else 64}'
    function = ir.FunctionType(result, [x.type for x in args])
    return cgutils.get_or_insert_function(builder.module, function, name), args


def _pointer(builder, address, index, kind):
    data = builder.inttoptr(address, kind.as_pointer())
    return builder.gep(data, [index])


@intrinsic
def width(typingctx, kind):
    """Number of entries of the type of vector `kind`, known to the compiler."""
    def lower(context, builder, signature, args):
        return context.get_constant(types.intp, kind.instance_type.width)

    return types.intp(kind), lower


@intrinsic
def bytes_of(typingctx, kind):
    """Size of an entry of the type of vector `kind`."""
    def lower(context, builder, signature, args):
        return context.get_constant(types.intp, kind.instance_type.dtype.bitwidth // 8)

    return types.intp(kind), lower


@intrinsic
def get(typingctx, address, index, kind):
    """The number at `index`, of the type that `kind` is made of."""
    vector = kind.instance_type

    def lower(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], args[1], _llvm(vector).element))

    return vector.dtype(types.intp, types.intp, kind), lower


@intrinsic
def get_whole(typingctx, address, index):
    """The 64-bit integer at `index`."""
    def lower(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], args[1], ir.IntType(64)))

    return types.int64(types.intp, types.intp), lower


@intrinsic
def put(typingctx, address, index, scalar):
    """Write a number to `index`."""
    def lower(context, builder, signature, args):
        builder.store(args[2], _pointer(builder, args[0], args[1], args[2].type))
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, scalar), lower


@intrinsic
def claim(typingctx, address):
    """Add one to the 64-bit integer at `address` and return what it was; no two threads get the same."""
    def lower(context, builder, signature, args):
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw('add', counter, ir.Constant(ir.IntType(64), 1), 'monotonic')

    return types.int64(types.intp), lower


@intrinsic
def fetch(typingctx, address):
    """Bring the cache line at `address` nearer; it may lie anywhere."""
    def lower(context, builder, signature, args):
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, 'llvm.prefetch.p0')
        builder.call(function, [builder.inttoptr(args[0], byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.none(types.intp), lower


@intrinsic
def load(typingctx, address, index, kind):
    """The vector of type `kind` that begins at `index`."""
    vector = kind.instance_type

    def lower(context, builder, signature, args):
        pointer = _pointer(builder, args[0], args[1], _llvm(vector).element)
        pointer = builder.bitcast(pointer, _llvm(vector).as_pointer())
        return builder.load(pointer, align=vector.dtype.bitwidth // 8)

    return vector(types.intp, types.intp, kind), lower


@intrinsic
def store(typingctx, address, index, vector):
    """Write a vector from `index` on."""
    def lower(context, builder, signature, args):
        pointer = _pointer(builder, args[0], args[1], args[2].type.element)
        pointer = builder.bitcast(pointer, args[2].type.as_pointer())
        builder.store(args[2], pointer, align=vector.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, vector), lower


@intrinsic
def fill(typingctx, scalar, kind):
    """Vector of type `kind` with `scalar` everywhere."""
    vector = kind.instance_type

    def lower(context, builder, signature, args):
        first = ir.Constant(ir.IntType(32), 0)
        undefined = ir.Constant(_llvm(vector), ir.Undefined)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.width), [0] * vector.width)
        element = context.cast(builder, args[0], signature.args[0], vector.dtype)
        return builder.shuffle_vector(builder.insert_element(undefined, element, first), undefined, lanes)

    return vector(scalar, kind), lower


def _binary(instruction: str):
    def typer(typingctx, a, b):
        def lower(context, builder, signature, args):
            return getattr(builder, instruction)(*args)

        return a(a, b), lower

    return intrinsic(typer)


add, sub, mul = map(_binary, ('fadd', 'fsub', 'fmul'))


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c"""
    def lower(context, builder, signature, args):
        function, args = _call(builder, 'fma', args[0].type, *args)
        return builder.call(function, args)

    return a(a, b, c), lower


@intrinsic
def maximum(typingctx, a, b):
    """The larger of each pair; b where a is no number."""
    def lower(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered('>', *args), *args)

    return a(a, b), lower


def _total(builder, x):
    element = x.type.element
    function, _ = _call(builder, 'vector.reduce.fadd', element, ir.Constant(element, 0.), x)
    return builder.call(function, [ir.Constant(element, -0.), x], fastmath=('reassoc',))


@intrinsic
def total(typingctx, a):
    """Sum of the entries, in an order that LLVM chooses."""
    def lower(context, builder, signature, args):
        return _total(builder, args[0])

    return a.dtype(a), lower


@intrinsic
def totals(typingctx, a, b, c, d):
    """The sums of the entries of four vectors, at less than half the cost of four times `total`."""
    def lower(context, builder, signature, args):
        n = a.width
        if n % 4:
            return context.make_tuple(builder, signature.return_type, [_total(builder, x) for x in args])

        def pick(x, y, *lanes):
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))

        def quads(*lanes):  # of each four entries of two vectors
            return [i + (lane if lane < 4 else n + lane - 4) for i in range(0, n, 4) for lane in lanes]

        def pairs(x, y):
            return builder.fadd(pick(x, y, *quads(0, 4, 1, 5)), pick(x, y, *quads(2, 6, 3, 7)))

        x, y = pairs(args[0], args[1]), pairs(args[2], args[3])
        x = builder.fadd(pick(x, y, *quads(0, 1, 4, 5)), pick(x, y, *quads(2, 3, 6, 7)))
        parts = [pick(x, x, *range(i, i + 4)) for i in range(0, n, 4)]
        while len(parts) > 1:
            parts = [builder.fadd(*parts[i:i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
        sums = [builder.extract_element(parts[0], ir.Constant(ir.IntType(32), i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, sums)

    return types.UniTuple(a.dtype, 4)(a, b, c, d), lower


@intrinsic
def largest(typingctx, a):
    """The largest entry, everywhere; the width must be a power of two."""
    # LLVM's own reduction goes through the entries one by one, since it passes over what is no number
    def lower(context, builder, signature, args):
        x, n = args[0], a.width
        undefined = ir.Constant(x.type, ir.Undefined)
        while n > 1:
            n //= 2
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), a.width), [i ^ n for i in range(a.width)])
            other = builder.shuffle_vector(x, undefined, lanes)
            x = builder.select(builder.fcmp_ordered('>', x, other), x, other)
        return x

    return a(a), lower


@intrinsic
def first_entry(typingctx, a):
    """The first entry."""
    def lower(context, builder, signature, args):
        return builder.extract_element(args[0], ir.Constant(ir.IntType(32), 0))

    return a.dtype(a), lower


@intrinsic
def exp(typingctx, a):
    """e to the power of entries that are at most 0; in float32 0 below -87, relative error under 2e-7.

    In float32 x = n ln 2 + r with |r| <= ln 2 / 2; exp r is the polynomial of Cephes' expf (Moshier), 2^n is made from
    its bits.
    """
    def lower(context, builder, signature, args):
        x, = args
        if a.dtype is types.float64:
            function, args = _call(builder, 'exp', x.type, x)
            return builder.call(function, args)
        kind, whole = x.type, ir.VectorType(ir.IntType(32), x.type.count)

        def constant(value):
            return ir.Constant(kind, [value] * kind.count)

        def integer(value):
            return ir.Constant(whole, [value] * kind.count)

        def fused(*args):
            function, args = _call(builder, 'fma', kind, *args)
            return builder.call(function, args)

        tiny = builder.fcmp_ordered('<', x, constant(-87.))
        function, args = _call(builder, 'floor', kind, fused(x, constant(1.4426950408889634), constant(0.5)))
        n = builder.call(function, args)
        r = fused(n, constant(2.12194440e-4), fused(n, constant(-0.693359375), x))
        p = constant(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = fused(p, r, constant(coefficient))
        p = fused(builder.fmul(p, r), r, builder.fadd(r, constant(1.)))
        n = builder.select(builder.fcmp_unordered('<', x, constant(-87.)), constant(0.), n)  # what no int can hold
        bits = builder.shl(builder.add(builder.fptosi(n, whole), integer(127)), integer(23))
        result = builder.fmul(p, builder.bitcast(bits, kind))
        return builder.select(tiny, constant(0.), result)

    return a(a), lower
