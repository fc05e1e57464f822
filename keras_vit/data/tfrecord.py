"""Single records of TFRecord files, which TensorFlow reads from first to last only.

A record is its length in eight bytes, four bytes of a checksum, its content, and four bytes of
another checksum (https://www.tensorflow.org/tutorials/load_data/tfrecord).
"""

LENGTH, CHECKSUM = 8, 4  # Bytes.


def offsets(path):
    """Where the records of a file start.

    Args:
        path: `Path` of an uncompressed file.

    Returns:
        List of ints, in bytes.
    """
    found, place, end = [], 0, path.stat().st_size
    with open(path, "rb") as file:
        while place < end:
            found.append(place)
            file.seek(place)
            length = int.from_bytes(file.read(LENGTH), "little")
            place += LENGTH + CHECKSUM + length + CHECKSUM
    return found


def read(path, offset):
    """The content of the record that starts at an offset in a file, as bytes."""
    with open(path, "rb") as file:
        file.seek(offset)
        length = int.from_bytes(file.read(LENGTH), "little")
        file.seek(CHECKSUM, 1)
        return file.read(length)
