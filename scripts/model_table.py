#!/usr/bin/env python3
"""The same as `elsa models`, from a clone."""
import sys

from elsa_models.commands.models import main

if __name__ == '__main__':
    sys.exit(main())
