"""What all pictures share: colours, style, texts that fit, and how they are written."""

import pathlib
import textwrap
import typing

from matplotlib import pyplot as plt
from matplotlib.ticker import ScalarFormatter

from keras_vit.files import atomic_write
from keras_vit.reporting import fonts
from keras_vit.reporting.texts import localize

# Okabe and Ito's palette, which is safe for colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
STYLE: dict[typing.Any, typing.Any] = {
    "font.family": fonts.FAMILY,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "image.interpolation": "nearest",
    "legend.edgecolor": "none",
    "savefig.dpi": 150,
    "text.parse_math": False,  # A class may be called `$`.
}


def fitted(text, inches, largest, smallest=7):
    """A text and its font size, smaller or wrapped as needed to fit a width in inches."""
    character = 0.56  # Mean width of a character, relative to the font size.
    longest = max(map(len, text.splitlines()), default=1)
    size = min(max(72 * inches / (character * longest), smallest), largest)
    width = max(1, int(72 * inches / (character * size) + 0.01))
    lines = (part for line in text.splitlines() for part in textwrap.wrap(line, width))
    return "\n".join(lines), size


class LocalizedTicks(ScalarFormatter):
    """Tick labels as the language writes numbers."""

    def __init__(self, language):
        super().__init__()
        self.language = language

    def __call__(self, x, pos=None):
        return localize(super().__call__(x, pos), self.language)


def save(figure, path, source):
    """Writes a figure, with the name of the data set at its top, if there is one, and closes it."""
    if source is not None:
        figure.suptitle(source, x=0.995, ha="right", fontsize=9, color=GREY)
    fonts.fit(figure)
    with atomic_write(pathlib.Path(path)) as part:
        figure.savefig(part)
    plt.close(figure)
