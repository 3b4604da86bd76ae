"""Numbers as a server reads, adds and writes them.

INCRBYFLOAT and HINCRBYFLOAT reckon in C's `long double`, of which x86-64 keeps a mantissa of 64
bits, and write 17 digits after the point: 1234.56 is 1234.56000000000000005 there. Scores of sorted
sets are the floats of Python. Where servers differ it is as in Valkey 9, but for one score in a
thousand, for which Valkey finds other digits. Errors of all: ValueError.
"""

import math
import re
from decimal import Decimal
from fractions import Fraction

_LARGEST = 2**63 - 1
_MANTISSA_BITS = 64
_LOWEST_BIT = 16_445  # 2 to the minus this is the smallest long double
_TOO_LARGE = Fraction(2) ** 16_384
_PLACES = 10**17
_LONGEST = 5 * 1024  # bytes of a text
_SCORES_AS_WHOLE = 2**62  # below it a whole score is written out

_INFINITE = re.compile(rb"[+-]?inf(inity)?", re.IGNORECASE)
_DECIMAL = re.compile(rb"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:[eE]([+-]?[0-9]+))?")
_HEX = re.compile(
    rb"([+-]?)0[xX](?=\.?[0-9a-fA-F])([0-9a-fA-F]*)\.?([0-9a-fA-F]*)(?:[pP]([+-]?[0-9]+))?"
)
_EXPONENT_MOST = Decimal(100_000)  # of any base it is too much, however many digits stand before it


def whole(text: bytes) -> int:
    """Return a whole number of 64 bits."""
    number = int(text)
    if str(number).encode() != text or not fits(number):
        raise ValueError(text)
    return number


def fits(number: int) -> bool:
    """Return whether a number has 64 bits at most."""
    return -_LARGEST - 1 <= number <= _LARGEST


# --- long doubles


def long_double(text: bytes) -> Fraction | None:
    """Return the long double that is nearest to a number, None for an infinite one."""
    if len(text) >= _LONGEST:
        raise ValueError("too long")
    if _INFINITE.fullmatch(text):
        return None
    exact = _exact(text)
    number = nearest(exact)
    if exact and not number:
        raise ValueError("too small")
    return number


def nearest(exact: Fraction) -> Fraction:
    """Return the long double that is nearest, of two equally near the even one."""
    if not exact:
        return exact
    size = abs(exact)
    bits = size.numerator.bit_length() - size.denominator.bit_length()  # or one more
    shift = _MANTISSA_BITS - bits - (size >= Fraction(2) ** bits)
    unit = Fraction(2) ** -min(shift, _LOWEST_BIT)
    number = round(exact / unit) * unit
    if abs(number) >= _TOO_LARGE:
        raise ValueError("too large")
    return number


def _exact(text: bytes) -> Fraction:
    if found := _DECIMAL.fullmatch(text):
        mantissa, exponent = found.groups()
        # By way of Decimal, which takes any number of digits.
        return _times(Fraction(Decimal(mantissa.decode())), 10, exponent)
    if found := _HEX.fullmatch(text):
        sign, before, behind, exponent = found.groups()
        mantissa = int(sign + before + behind, 16)
        return _times(Fraction(mantissa, 16 ** len(behind)), 2, exponent)
    raise ValueError("no number")


def _times(mantissa: Fraction, base: int, exponent: bytes | None) -> Fraction:
    if not mantissa or exponent is None:
        return mantissa
    power = Decimal(exponent.decode())
    bounded: Decimal = max(-_EXPONENT_MOST, min(power, _EXPONENT_MOST))
    return mantissa * Fraction(base) ** int(bounded)


def long_double_text(number: Fraction) -> bytes:
    """Return how a long double is written."""
    parts = round(abs(number) * _PLACES)
    before, behind = divmod(parts, _PLACES)
    digits = f"{Decimal(before):f}.{behind:017d}".rstrip("0").rstrip(".")
    return ("-" + digits if parts and number < 0 else digits).encode()


# --- scores


def score(text: bytes) -> float:
    """Return a score."""
    found = _DECIMAL.fullmatch(text)
    if found is None:
        if _INFINITE.fullmatch(text):
            return float(text)
        raise ValueError("no number")
    number = float(text)
    if math.isinf(number) or (not number and found[1].strip(b"+-0.")):
        raise ValueError("too large or too small")
    return number


def score_text(number: float) -> bytes:
    """Return how a score is written: in as few digits as tell it, and rarely with an exponent."""
    if math.isinf(number) or not number:
        return (b"-" if math.copysign(1, number) < 0 else b"") + (b"inf" if number else b"0")
    if number == int(number) and abs(number) < _SCORES_AS_WHOLE:
        return b"%d" % int(number)
    sign, digits, power = Decimal(repr(number)).normalize().as_tuple()
    assert isinstance(power, int)  # it is finite
    exponent = power + len(digits) - 1
    if _has_no_exponent(len(digits), power, abs(exponent)):
        return f"{Decimal(repr(number)):f}".encode()
    first, rest = str(digits[0]), "".join(map(str, digits[1:]))
    point = "." if rest else ""
    return f"{'-' * sign}{first}{point}{rest}e{exponent:+d}".encode()


def _has_no_exponent(digits: int, power: int, exponent: int) -> bool:
    if power >= 0:
        return exponent < digits + 7
    return power > -7 or exponent < 4  # noqa: PLR2004 - so the servers have it
