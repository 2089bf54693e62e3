#!/usr/bin/env python3
"""The same as `elsa detect`, from a clone."""
import sys

from elsa_models.commands.detect import main

if __name__ == '__main__':
    sys.exit(main())
