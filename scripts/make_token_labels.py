#!/usr/bin/env python3
"""The same as `elsa token-labels`, from a clone."""
import sys

from elsa_models.commands.token_labels import main

if __name__ == '__main__':
    sys.exit(main())
