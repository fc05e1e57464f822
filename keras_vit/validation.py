"""Checks of arguments, with errors that name the argument and the value received."""

import numbers

# How an image is fitted to a size of another aspect ratio.
RESIZINGS = ("squash", "crop", "pad")


def positive_integer(name: str, value: int) -> int:
    """`value` as an int.

    Raises:
        ValueError: if it is not an integer, is a bool, or is below 1.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"Expected `{name}` to be an integer of at least 1. Received: {name}={value!r}"
        )
    return int(value)


def shape_of_image(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """`image_shape` as a tuple of three ints.

    Raises:
        ValueError: if it is not three integers of at least 1.
    """
    try:
        height, width, channels = (positive_integer("", size) for size in image_shape)
    except (TypeError, ValueError):
        raise ValueError(
            "Expected `image_shape` to be (height, width, channels), integers of at least 1. "
            f"Received: image_shape={image_shape!r}"
        ) from None
    return height, width, channels


def grid_of_patches(grid: tuple[int, int]) -> tuple[int, int]:
    """`grid` as a tuple of two ints.

    Raises:
        ValueError: if it is not two integers of at least 1.
    """
    try:
        rows, columns = (positive_integer("", size) for size in grid)
    except (TypeError, ValueError):
        raise ValueError(
            "Expected `grid` to be (rows, columns) of patches, integers of at least 1. "
            f"Received: grid={grid!r}"
        ) from None
    return rows, columns


def fraction(name: str, value: float) -> float:
    """`value`, if it is a number in [0, 1].

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"Expected `{name}` to be a number in [0, 1]. Received: {name}={value!r}")
    return value


def fraction_below_one(name: str, value: float) -> float:
    """`value`, if it is a number in [0, 1).

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, numbers.Real) or not 0 <= value < 1:
        raise ValueError(f"Expected `{name}` to be a number in [0, 1). Received: {name}={value!r}")
    return value


def resizing(resize: str) -> str:
    """`resize`, if it is one of `RESIZINGS`.

    Raises:
        ValueError: if it is not.
    """
    if resize not in RESIZINGS:
        names = ", ".join(map(repr, RESIZINGS))
        raise ValueError(f"Expected `resize` to be one of {names}. Received: resize={resize!r}")
    return resize
