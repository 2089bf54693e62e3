"""Push a folder made by `elsa convert` or `elsa train` to a repository of a hub.

    elsa publish FOLDER OWNER/NAME --dry-run
    elsa publish FOLDER OWNER/NAME --private

HF_ENDPOINT names another hub than huggingface.co; the token is that of `hf auth login` or HF_TOKEN.
"""
import argparse
import sys
from typing import List, Optional

from ..hub import WeightsError
from ..hub.publish import publish


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('folder')
    parser.add_argument('repository', help='OWNER/NAME, created if need be')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', help='branch, created if need be (default: the main one)')
    parser.add_argument('--message', help='of the commit')
    parser.add_argument('--dry-run', action='store_true', help='check the folder and send nothing')
    args = parser.parse_args(argv)
    try:
        published = publish(
            args.folder, args.repository, args.private, args.revision, args.message, dry_run=args.dry_run)
    except (WeightsError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print('would publish' if args.dry_run else 'published', published.url, 'at', published.revision)
    for file in published.files:
        print(f'  {file}')
    return 0
