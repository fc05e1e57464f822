"""Checks of arguments that the layers and the model share."""

import numbers


def positive_integer(name, value):
    """`value` as an int.

    Raises:
        ValueError: if it is no integer, a bool, or below 1.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"Expected `{name}` to be an integer of at least 1. Received: {name}={value!r}"
        )
    return int(value)
