#!/usr/bin/env python3
"""Get the pictures of emoji that the study trains on: two npm packages, 140 MB to fetch, of which 20 MB stay.

    python scripts/get_emoji.py                       with npm
    python scripts/get_emoji.py --tarballs FOLDER     from files that `npm pack` has written elsewhere

Noto's pictures are under the Apache License 2.0, Twemoji's under CC-BY 4.0.
"""
import argparse
import sys
from pathlib import Path
from typing import List, Optional

from elsa_models._files import OutputError
from elsa_models._images import DataError
from elsa_models.study.emoji import get_emoji


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--output', type=Path, default=Path('output') / 'emoji', metavar='FOLDER',
                        help='folder to write (default: %(default)s)')
    parser.add_argument('--tarballs', type=Path, metavar='FOLDER', help='folder of the two packages, instead of npm')
    args = parser.parse_args(argv)
    try:
        get_emoji(args.output, args.tarballs)
    except (DataError, OutputError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print(f'{args.output}: holds the emoji')
    return 0


if __name__ == '__main__':
    sys.exit(main())
