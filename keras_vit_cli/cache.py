"""`cache`: the decoded images that training keeps."""

from keras_vit.data import ImageError, cache
from keras_vit_cli.errors import CommandError


def run(options):
    """Shows the size of the cache of decoded images, or clears it; returns the exit status."""
    try:
        place, count, size = cache.usage()
        if options.clear:
            cache.clear()
    except ImageError as error:
        raise CommandError(str(error), 1) from error
    sets = f"{count} decoded set{'' if count == 1 else 's'} of images, {size / 2**20:,.1f} MiB"
    if options.clear:
        print(f"Removed {sets}, from {place}.")
    else:
        print(f"{place}: {sets}. Remove them by `keras-vit cache --clear`.")
    return 0
