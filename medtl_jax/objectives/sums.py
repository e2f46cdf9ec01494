"""Sums of losses as a setting writes them: `l2sp + 0.1*bss`."""

import math
import re
from collections.abc import Collection

from medtl_jax.errors import UserError

# A plus sign that is not of an exponent, as in 1e+3.
_PLUS = re.compile(r"(?<![\d.][eE])\+")
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def parse_sum(key: str, text: str, known: Collection[str], example: str) -> tuple:
    """`((factor, name), ...)` of the losses in a setting; none for `none`.

    The grammar is `none` or `[factor*]name [+ [factor*]name ...]`; a factor left out is 1.

    Args:
      key: the setting, for messages.
      text: its value.
      known: the names there are.
      example: a sum of them.

    Raises:
      UserError: for anything else, an unknown name, one that stands twice, or a factor that is
        not a positive finite number.
    """
    setting = f"{key}={text!r}"
    if text.strip() == "none":
        return ()
    found: dict[str, float] = {}
    for part in _PLUS.split(text):
        factor, star, name = (piece.strip() for piece in part.rpartition("*"))
        if name not in known:
            raise UserError(
                f"{setting}: {name!r} is not known; write none, or losses as in {example!r}, of "
                f"{', '.join(known)}"
            )
        if name in found:
            raise UserError(f"{setting}: {name} stands there twice; name each loss once")
        value = float(factor) if _NUMBER.fullmatch(factor) else math.nan
        if star and not 0 < value < math.inf:
            raise UserError(f"{setting}: the factor {factor!r} must be a positive finite number")
        found[name] = value if star else 1.0
    return tuple((factor, name) for name, factor in found.items())
