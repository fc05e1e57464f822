"""Fonts for the letters of class names: those of the system, else a replacement."""

import functools
import warnings

from matplotlib import font_manager
from matplotlib.text import Text

FAMILY = "DejaVu Sans"  # It comes with Matplotlib.
MISSING = "□"
# Of Matplotlib: it has a box for each letter of every script.
PLACEHOLDERS = "Last Resort"


def families(texts):
    """Names of fonts that have the letters of some texts, as far as the system has such fonts.

    Args:
        texts: list of strings.

    Returns:
        List of strings, Matplotlib's own font first.
    """
    missing = _missing("".join(texts), [FAMILY])
    chosen = [FAMILY]
    if not missing:  # The usual case; the fonts of a system may be thousands.
        return chosen
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda x: (x.weight != 400, x.name)):
        found = missing & _letters(entry.fname)
        if found and entry.name not in chosen and not entry.name.startswith(PLACEHOLDERS):
            chosen.append(entry.name)
            missing = _missing("".join(missing), chosen)
        if not missing:
            break
    return chosen


def legible(names, prefix):
    """Class names, of which those with letters that no font has become numbers.

    Args:
        names: list of strings.
        prefix: string in front of the number, the word for "class".

    Returns:
        List of strings.
    """
    known = families(names)
    return [
        f"{prefix} {number}" if _missing(name, known) else name for number, name in enumerate(names)
    ]


def _missing(text, known):
    """The letters of a text that none of the fonts has."""
    if text.isascii():
        return set()
    return (set(text) - {"\n"}).difference(*(_letters(_file(name)) for name in known))


@functools.cache
def _file(family):
    return font_manager.findfont(family, fallback_to_default=False)


@functools.cache
def _letters(path):
    """The letters of a font's file; none if it cannot be drawn, as with bitmaps of emoji."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            font = font_manager.get_font(path)
            font.set_size(10, 72)
            characters = font.get_charmap()
            font.load_char(next(iter(characters)))
            return frozenset(map(chr, characters))
    except (RuntimeError, OSError, StopIteration):
        return frozenset()


def fit(figure):
    """Gives the texts of a figure fonts that have their letters; boxes stand for the others."""
    texts = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    known = families([text.get_text() for text in texts])
    for text in texts:
        text.set_family(known)
        missing = _missing(text.get_text(), known)
        text.set_text("".join(MISSING if x in missing else x for x in text.get_text()))
