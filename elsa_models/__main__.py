"""`python -m elsa_models` is the command `elsa`."""
import sys

from elsa_command import main

if __name__ == '__main__':
    sys.exit(main())
