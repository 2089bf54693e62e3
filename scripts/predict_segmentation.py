#!/usr/bin/env python3
"""The same as `elsa predict-segmentation`, from a clone."""
import sys

from elsa_models.commands.predict_segmentation import main

if __name__ == '__main__':
    sys.exit(main())
