#!/usr/bin/env python3
"""The same as `elsa train-detection`, from a clone."""
import sys

from elsa_models.commands.train_detection import main

if __name__ == '__main__':
    sys.exit(main())
