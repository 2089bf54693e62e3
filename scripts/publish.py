#!/usr/bin/env python3
"""The same as `elsa publish`, from a clone."""
import sys

from elsa_models.commands.publish import main

if __name__ == '__main__':
    sys.exit(main())
