"""An extension of griffe: examples of docstrings as blocks of code."""

import re

import griffe

# Lines from a prompt to the next empty line.
BLOCK = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class DoctestBlocks(griffe.Extension):
    """Fences what Keras's docstrings, and so ours, write without a fence."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = BLOCK.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
