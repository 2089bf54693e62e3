#!/usr/bin/env python3
"""The same as `elsa export`, from a clone."""
import sys

from elsa_models.commands.export import main

if __name__ == '__main__':
    sys.exit(main())
