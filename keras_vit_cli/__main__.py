"""`python -m keras_vit_cli` is the command `keras-vit`."""

import sys

from keras_vit_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
