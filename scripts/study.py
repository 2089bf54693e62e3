#!/usr/bin/env python3
"""The same as `elsa study`, from a clone."""
import sys

from elsa_models.commands.study import main

if __name__ == '__main__':
    sys.exit(main())
