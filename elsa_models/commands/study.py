"""Run the study of mixers, check what is recorded of it, or draw it; see docs/study.md.

    elsa study digits                             run what is missing of configs/study/digits.yaml, or of a FILE
    elsa study digits shapes --jobs 4             in four processes
    elsa study digits shapes --shard 3/16         the third of sixteen parts
    elsa study digits --mixers window_bias elsa
    elsa study digits --check                     make three runs anew and compare
    elsa study digits shapes --progress           how far it is
    elsa study digits shapes --report             tables of docs/study.md, and figures
    elsa study digits --pictures                  what each mixer has learned to look at

Stopped at any moment, the same command goes on. Results are rows of benchmarks/results/study/NAME.csv.
"""
import argparse
import logging
import sys
from pathlib import Path
from typing import List, Optional, Tuple

from timm.utils import setup_default_logging

from .._files import OutputError
from .._images import DataError
from ..study import pictures, report, runner
from ..training import RecipeError
from ..training.config import find_recipe
from ..training.signals import Stopped


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('studies', nargs='+', metavar='NAME', help='studies of this package or YAML files, run in this'
                        ' order')
    parser.add_argument('--results', type=Path, default=Path('benchmarks') / 'results' / 'study', metavar='FOLDER',
                        help='folder of the CSV files (default: %(default)s)')
    parser.add_argument('--work', type=Path, default=Path('output') / 'study', metavar='FOLDER',
                        help='folder of data and unfinished runs (default: %(default)s)')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='processes (default: %(default)s)')
    parser.add_argument('--shard', type=_shard, default=(1, 1), metavar='I/N', help='part I of N, from 1')
    parser.add_argument('--mixers', nargs='+', default=(), metavar='NAME', help='run these alone')
    parser.add_argument('--limit', type=int, metavar='N', help='stop after so many runs of each process')
    parser.add_argument('--docs', type=Path, default=Path('docs'), metavar='FOLDER',
                        help='folder with study.md and img, for reports and pictures (default: %(default)s)')
    action = parser.add_mutually_exclusive_group()
    action.add_argument('--check', type=int, nargs='?', const=3, metavar='N',
                        help='make N recorded runs anew, 3 if none is given, and compare every bit')
    action.add_argument('--progress', action='store_true', help='say how many runs there are and are recorded')
    action.add_argument('--report', action='store_true', help='write the tables of docs/study.md and draw the figures')
    action.add_argument('--pictures', action='store_true', help='draw the attention of the models that were kept')
    action.add_argument('--merge', type=Path, metavar='FOLDER', help='add the rows of the CSV files of another folder')
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f'--jobs: got {args.jobs}, must be at least 1')
    setup_default_logging(logging.WARNING)
    logging.getLogger('elsa_models.study').setLevel(logging.INFO)
    places = runner.Places(args.results, args.work)
    try:
        studies = [find_recipe(name, 'study') for name in args.studies]
        if args.progress:
            for name, done, size in runner.progress(studies, places):
                print(f'{name}: {done} of {size}')
        elif args.report:
            for path in report.report(studies, places, args.docs / 'study.md', args.docs / 'img'):
                print(path)
        elif args.pictures:
            for path in studies:
                print(pictures.draw(path, places, args.docs / 'img'))
        elif args.merge is not None:
            for path in studies:
                print(f'{path.stem}: {places.of(path.stem).merge(args.merge / f"{path.stem}.csv")} rows added')
        elif args.check is not None:
            differences = runner.check(studies, places, args.check)
            for line in differences:
                print(line)
            print(f'{args.check - len(differences)} of {args.check} runs are the same, bit for bit')
            return 1 if differences else 0
        else:
            runner.run(studies, places, args.jobs, args.shard, args.limit, args.mixers)
    except (RecipeError, DataError, OutputError, OSError, ImportError, runner.StudyError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print('stopped; the same command goes on from there', file=sys.stderr)
        return e.status if isinstance(e, Stopped) else 130
    return 0


def _shard(text: str) -> Tuple[int, int]:
    part, _, parts = text.partition('/')
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f'got {text!r}, must be I/N with I from 1 to N')
    return int(part), int(parts)
