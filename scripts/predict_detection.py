#!/usr/bin/env python3
"""The same as `elsa predict-detection`, from a clone."""
import sys

from elsa_models.commands.predict_detection import main

if __name__ == '__main__':
    sys.exit(main())
