"""What the files of a set are like: which cannot be used, and notes on what was done to them."""

import dataclasses
from collections import Counter
from typing import Protocol

import numpy as np

from medtl_jax.errors import UserError


class Decoded(Protocol):
    """One image: pixels `[s, s]` if grey or `[s, s, 3]`, and what its file was like.

    `highest` is the largest raw value of a 16-bit file, None for an 8-bit one; `how` is a note on
    its mapping to 0..255, "" for a picture.
    """

    pixels: np.ndarray
    highest: int | None
    alpha: bool
    how: str


@dataclasses.dataclass
class Survey:
    """Counts over the images of a set, added one by one in the order of the set.

    Attributes:
      bit_depth: bits in use in 16-bit files, as the user set it.
      total: images added.
      bad: `"name (reason)"` of those that cannot be used.
      highest: largest raw value of each 16-bit image.
      alpha: images with an alpha channel.
      grey: images of one channel.
      how: images by the mapping to 0..255 that their files asked for.
    """

    bit_depth: int
    total: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    highest: list[int] = dataclasses.field(default_factory=list)
    alpha: int = 0
    grey: int = 0
    how: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, name: object, result: Decoded | str) -> bool:
        """Returns whether the image can be used; `result` is a reason where it cannot."""
        self.total += 1
        if isinstance(result, str):
            self.bad.append(f"{name} ({result})")
            return False
        if result.highest is not None:
            self.highest.append(result.highest)
        self.alpha += result.alpha
        if result.how:
            self.how[result.how] += 1
        self.grey += result.pixels.ndim == 2
        return True

    @property
    def channels(self) -> int:
        """1 if every image is grey, else 3."""
        return 1 if self.grey == self.total else 3

    def check(self, check_depth: bool) -> None:
        """Raises UserError for images that cannot be used.

        With `check_depth` also for 16-bit images that would come out black because they hold 12
        bits or fewer.
        """
        if self.bad:
            raise UserError(
                f"{len(self.bad)} of {self.total} images cannot be read, first: {self.bad[0]}; "
                "replace or remove them"
            )
        if not check_depth or not self.highest or self.bit_depth != 16:
            return
        highest = max(self.highest)
        if highest < 2**12:
            needed = 12 if highest > 255 else 8
            raise UserError(
                f"the 16-bit images use only 0..{highest} and would come out nearly black: "
                f"set data.bit_depth={needed}"
            )

    def notes(self, widened: bool) -> tuple[str, ...]:
        """Returns a line for each thing that was done; `widened`: grey images got 3 channels."""
        notes = []
        if self.highest:
            notes.append(
                f"{len(self.highest)} of {self.total} images are 16-bit: 0..{2**self.bit_depth - 1}"
                f" (data.bit_depth={self.bit_depth}) mapped to 0..255, "
                f"highest value {max(self.highest)}"
            )
        notes += [f"{count} of {self.total} images: {how}" for how, count in self.how.items()]
        if self.alpha:
            notes.append(
                f"{self.alpha} of {self.total} images have an alpha channel, which was dropped"
            )
        if widened and self.grey:
            notes.append(f"{self.grey} of {self.total} images are grey, repeated in three channels")
        return tuple(notes)
