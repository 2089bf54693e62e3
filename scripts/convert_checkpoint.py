#!/usr/bin/env python3
"""The same as `elsa convert`, from a clone."""
import sys

from elsa_models.commands.convert import main

if __name__ == '__main__':
    sys.exit(main())
