r"""One mathematical expression: read by math-verify's parser of LaTeX, compared by its values.

math-verify compares by absolute differences and drops what it does not know. Here every sign of the text must be one
that the parser is known to read, decimals become exact fractions, and two expressions are equal if their values are:
exactly where these are rational, else to `AGREE` of `DIGITS` digits, at several values of the variables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from typing import Any

import mpmath
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

from megarl.rewards.answers import numerals
from megarl.rewards.answers.numerals import joined
from megarl.rewards.answers.vocabulary import READ_COMMANDS, words

DIGITS, AGREE = 120, 90  # decimal digits: of the arithmetic, and of two equal values
DOUBLE = 15  # a decimal with as many digits is a rounded double
LONGEST = 1000  # characters

_TOKEN = re.compile(r"\\[a-zA-Z]+|\d+(?:\.\d*)?|\.\d+|\s+|.", re.S)
_SIGNS = set("+-*/^_(){}[]|!=,")
_NUMBER = re.compile(r"\d*\.\d+|\d+\.")
_NOT_READ = re.compile(
    r"\d\s+[\d.]"  # two numbers side by side
    r"|(?<![\\a-zA-Z])[a-zA-Z]\d"  # x3
    r"|[\d)}\]|!]\s*_"  # 17_{7}: the parser drops the base
    r"|\^\{[^{}]*\^\{[^{}]*\^\{[^{}]*\^\{"  # a tower
    r"|(?<![\\a-zA-Z])[a-zA-Z]{5,}"  # a word
    r"|,(?![^(]*\))|\|\s*\||[-+*/^_=,]\s*$|^\s*[*/^_=,!]"
)
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}")
_CONFIG = ConversionConfig(lowercase_symbols=False)
Value = Any  # a Fraction, or mpmath's real or complex number


class Unreadable(ValueError):
    """Some of the text was not understood."""


@lru_cache(maxsize=4096)
def parse(text: str) -> Fraction | sympy.Basic:
    """The number or the expression that the whole of a normalised text stands for. Raises Unreadable."""
    if (number := numerals.read(text)) is not None:
        return number
    if len(text) > LONGEST:
        raise Unreadable(f"{len(text)} characters")
    text = _prepare(text)
    try:
        tree = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=_CONFIG)
    except Exception as e:  # of many kinds: those of ANTLR, sympy and the parser's own
        raise Unreadable(str(e).partition("\n")[0]) from None
    if not isinstance(tree, sympy.Expr):
        raise Unreadable(f"a {type(tree).__name__}")
    letters = set(re.sub(r"\\[a-zA-Z]+|_\{[^{}]*\}", " ", text)) & set(_LETTERS)
    known = {name for symbol in tree.atoms(sympy.Symbol) for name in symbol.name[:1]} | {"e"}
    if letters - known - set("dfgh"):
        raise Unreadable(f"{', '.join(sorted(letters - known))} was not read")
    with mpmath.workdps(DIGITS):
        if not list(_points(tree, tree)):
            raise Unreadable("it has no value")
    return tree


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _prepare(text: str) -> str:
    """The text with exact numbers, once each of its signs is one that the parser reads."""
    text = joined(text)
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\\frac{\1 \\pi}{180})", text)
    text = re.sub(r"\)\s*(?=\\frac)", r") \\cdot ", text)  # no mixed number
    if found := _NOT_READ.search(text):
        raise Unreadable(found[0])
    for token in _TOKEN.findall(text):
        if token[0] == "\\" and token[1:] not in READ_COMMANDS:
            raise Unreadable(token)
        known = token[0] == "\\" or token.isspace() or token in _SIGNS or _NUMBER.fullmatch(token)
        if not known and not (token.isascii() and token[-1:].isalnum()):
            raise Unreadable(token)
    return _NUMBER.sub(_exact, text)


def _exact(found: re.Match[str]) -> str:
    value = Fraction(found[0].rstrip("."))
    return rf"{{\frac{{{value.numerator}}}{{{value.denominator}}}}}"


# Values


def equal(a: str, b: str) -> bool:
    """Whether two expressions have the same value. Raises Unreadable."""
    left, right = parse(a), parse(b)
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right or _rounded(a, b, left, right)
    with mpmath.workdps(DIGITS):
        pairs = list(_points(left, right))
        if not pairs:
            return False
        return all(_close(x, y) for x, y in pairs) or (len(pairs) == 1 and _rounded(a, b, *pairs[0]))


def proportional(a: tuple[str, str], b: tuple[str, str], positive: bool) -> bool:
    """Whether the differences a[0] - a[1] and b[0] - b[1] have a constant, non-zero ratio: the same equation."""
    left, right = (sympy.Add(*_difference(sides), evaluate=False) for sides in (a, b))
    with mpmath.workdps(DIGITS):
        pairs = [(x, y) for x, y in _points(left, right) if x != 0 or y != 0]
        if not pairs or any(x == 0 or y == 0 for x, y in pairs):
            return False
        ratios = [_divide(x, y) for x, y in pairs]
        if positive and not all(mpmath.im(_mp(r)) == 0 and mpmath.re(_mp(r)) > 0 for r in ratios):
            return False
        return len(_free(left) | _free(right)) > 0 and all(_close(r, ratios[0]) for r in ratios)


def _difference(sides: tuple[str, str]) -> tuple[sympy.Basic, sympy.Basic]:
    left, right = (parse(side) for side in sides)
    return sympy.sympify(left), sympy.Mul(-1, sympy.sympify(right), evaluate=False)


def number(text: str) -> Fraction | float | None:
    """The real value of an expression without variables, to `AGREE` decimals if it is irrational; ±inf. Else None."""
    if found := re.fullmatch(r"([+-]?) ?\\infty", text):
        return -math.inf if found[1] == "-" else math.inf
    try:
        tree = parse(text)
        with mpmath.workdps(DIGITS):
            value = None if _free(tree) else _at(tree, {})
            if isinstance(value, mpmath.mpf):
                value = Fraction(int(mpmath.nint(value * mpmath.mpf(10) ** AGREE)), 10**AGREE)
    except Unreadable:
        return None
    return value if isinstance(value, Fraction) else None


def _free(tree: Fraction | sympy.Basic) -> set[str]:
    return set() if isinstance(tree, Fraction) else {s.name for s in tree.free_symbols} - {"i"}


def _rounded(a: str, b: str, left: Value, right: Value) -> bool:
    """Whether one is a double, whose last digits are rounded."""
    if max(numerals.digits(a), numerals.digits(b)) < DOUBLE:
        return False
    left, right = _mp(left), _mp(right)
    return bool(abs(left - right) <= mpmath.mpf(10) ** (1 - DOUBLE) * max(abs(left), abs(right)))


def _close(x: Value, y: Value) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = _mp(x), _mp(y)
    largest = max(abs(x), abs(y))
    tiny = mpmath.mpf(10) ** -AGREE
    return bool(abs(x - y) <= tiny * largest) or bool(largest < tiny)


def _points(left: Fraction | sympy.Basic, right: Fraction | sympy.Basic) -> Any:
    """Both values at each point where both have one, and one is real unless i is among the signs."""
    names = sorted(_free(left) | _free(right))
    complex_too = any(_has_i(tree) for tree in (left, right))
    found = 0
    for values in _SAMPLES if names else _SAMPLES[:1]:
        env = {name: values[i % len(values)] + 7 * (i // len(values)) for i, name in enumerate(names)}
        x, y = _at(left, env), _at(right, env)
        if x is None or y is None:
            continue
        if names and not complex_too and isinstance(x, mpmath.mpc) and isinstance(y, mpmath.mpc):
            continue
        found += 1
        yield x, y
    if names and found < 3:
        raise Unreadable("no values to compare at")


_SAMPLES: list[tuple[Fraction, ...]] = [
    tuple(map(Fraction, values.split()))
    for values in (
        "2 3 5 7 11 13", "3 2 7 4 5 9", "4 7 3 8 6 5", "9 5 2 3 4 8", "1/3 2/7 3/5 1/8 4/9 2/11",
        "5/7 1/9 2/3 3/8 1/6 7/10", "7/3 19/5 12/7 23/9 29/8 31/6", "-2/3 -5/4 -9/7 -1/5 -8/3 -11/9",
        "-7/2 4/3 -1/4 6/5 -3/8 10/7", "5/2 -8/3 7/9 -13/4 3/10 -6/7", "-12 -7 -5 -9 -4 -3",
    )
]  # fmt: skip


def _has_i(tree: Fraction | sympy.Basic) -> bool:
    return not isinstance(tree, Fraction) and any(s.name == "i" for s in tree.free_symbols)


def _at(tree: Fraction | sympy.Basic, env: Mapping[str, Fraction]) -> Value | None:
    """The value at one point. None where there is none."""
    try:
        value = tree if isinstance(tree, Fraction) else _value(tree, env)
        if isinstance(value, mpmath.mpc) and abs(value.imag) <= mpmath.mpf(10) ** -AGREE * abs(value):
            value = value.real
        return None if not isinstance(value, Fraction) and not mpmath.isfinite(value) else value
    except Unreadable:
        raise
    except (ArithmeticError, ValueError):  # a pole, or outside a function's domain
        return None


def _value(tree: sympy.Basic, env: Mapping[str, Fraction]) -> Value:
    if isinstance(tree, sympy.Rational):
        return Fraction(int(tree.p), int(tree.q))
    if isinstance(tree, sympy.Symbol):
        return mpmath.mpc(0, 1) if tree.name == "i" else env[tree.name]
    if tree in _CONSTANTS:
        return _CONSTANTS[tree]()
    if isinstance(tree, sympy.Sum | sympy.Integral | sympy.Product):
        done = tree.subs(
            {s: sympy.Rational(env[s.name].numerator, env[s.name].denominator) for s in tree.free_symbols}
        ).doit()
        if done.has(sympy.Sum, sympy.Integral, sympy.Product):
            raise Unreadable("a sum or an integral without a closed form")
        return _value(done, {})
    values = [_value(argument, env) for argument in tree.args]
    if isinstance(tree, sympy.Add):
        return _folded(values, lambda x, y: x + y)
    if isinstance(tree, sympy.Mul):
        return _folded(values, lambda x, y: x * y)
    if isinstance(tree, sympy.Pow):
        return _power(*values)
    if isinstance(tree, sympy.UnevaluatedExpr):
        return values[0]
    function = _CALLS.get(type(tree).__name__)
    if function is None:
        raise Unreadable(type(tree).__name__)
    return function(*values)


def _folded(values: list[Value], combine: Callable[[Value, Value], Value]) -> Value:
    total = values[0]
    for value in islice(values, 1, None):
        exact = isinstance(total, Fraction) and isinstance(value, Fraction)
        total = combine(total, value) if exact else combine(_mp(total), _mp(value))
    return total


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        size = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator)
        if size <= 2_000_000:
            return base**exponent.numerator
    base, exponent = _mp(base), _mp(exponent)
    if base and mpmath.mag(exponent) + mpmath.mag(mpmath.mag(base) or 1) > 64:
        raise Unreadable("a power beyond all numbers")
    return mpmath.power(base, exponent)


def _factorial(n: Value) -> Value:
    if isinstance(n, Fraction) and n.denominator == 1 and 0 <= n <= 2000:
        return Fraction(int(mpmath.factorial(n.numerator)) if n < 20 else _exact_factorial(n.numerator))
    if abs(_mp(n)) > 10**6:
        raise Unreadable("a factorial beyond all numbers")
    return mpmath.gamma(_mp(n) + 1)


def _exact_factorial(n: int) -> int:
    return int(sympy.factorial(n))


def _floor(x: Value) -> Value:
    return Fraction(x.numerator // x.denominator) if isinstance(x, Fraction) else Fraction(int(mpmath.floor(x)))


def _divide(x: Value, y: Value) -> Value:
    return x / y if isinstance(x, Fraction) and isinstance(y, Fraction) else _mp(x) / _mp(y)


def _mp(x: Value) -> Value:
    return mpmath.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def _real(name: str) -> Callable[..., Value]:
    def call(*values: Value) -> Value:
        return getattr(mpmath, name)(*map(_mp, values))

    return call


def _first(pick: Callable[..., Value]) -> Callable[..., Value]:
    def call(*values: Value) -> Value:
        return pick(values, key=_mp)

    return call


def _log(x: Value, base: Value | None = None) -> Value:
    return mpmath.log(_mp(x)) if base is None else mpmath.log(_mp(x)) / mpmath.log(_mp(base))


_CONSTANTS: dict[Any, Callable[[], Value]] = {
    sympy.pi: lambda: +mpmath.pi, sympy.E: lambda: +mpmath.e, sympy.I: lambda: mpmath.mpc(0, 1),
    sympy.EulerGamma: lambda: Fraction(577_215_664_901, 999_999_999_989),  # \gamma is a variable
}  # fmt: skip
_CALLS: dict[str, Callable[..., Value]] = {
    **{name: _real(name) for name in words("sin cos tan cot sec csc asin acos atan sinh cosh tanh exp binomial")},
    "log": _log, "Abs": lambda x: abs(x), "factorial": _factorial, "floor": _floor,
    "ceiling": lambda x: -_floor(-x), "Max": _first(max), "Min": _first(min),
}  # fmt: skip

parse(r"\frac{x^{2}}{3}+\sqrt{2}")  # the first call builds the grammar in 0.4 s: do it before any deadline runs
