#!/usr/bin/env python3
"""The same as `elsa validate`, from a clone."""
import sys

from elsa_models.commands.validate import main

if __name__ == '__main__':
    sys.exit(main())
