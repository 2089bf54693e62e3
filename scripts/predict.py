#!/usr/bin/env python3
"""The same as `elsa predict`, from a clone."""
import sys

from elsa_models.commands.predict import main

if __name__ == '__main__':
    sys.exit(main())
