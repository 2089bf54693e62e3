#!/usr/bin/env python3
"""The same as `elsa segment`, from a clone."""
import sys

from elsa_models.commands.segment import main

if __name__ == '__main__':
    sys.exit(main())
