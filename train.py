"""Trains a Vision Transformer and shows what it learned: `python train.py --help`."""

import sys

from keras_vit_cli.main import train

if __name__ == "__main__":
    sys.exit(train())
