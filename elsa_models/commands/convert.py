"""Convert a checkpoint into a folder that timm reads: model.safetensors, config.json and a model card.

    elsa convert elsa_swin_tiny elsa_swin_tiny.pth.tar OUT --tag damo_in1k

It takes the classification checkpoints of a model's authors, with or without averaged weights; the backbone inside
their detection and segmentation checkpoints; our own training checkpoints; and those of a relative, such as timm's Swin
or VOLO, of which what the model shares with it is copied. It prints what became of every entry.
"""
import argparse
import json
import sys
from typing import List, Optional

from ..hub import OutputError, WeightsError
from ..hub.convert import KINDS, convert, save


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('architecture', help='name of the model, such as elsa_swin_tiny')
    parser.add_argument('checkpoint', help='file to convert')
    parser.add_argument('folder', help='folder to make; one that holds nothing but such files is replaced')
    parser.add_argument('--kind', choices=KINDS, default='auto', help='what the file holds (default: by its entries)')
    parser.add_argument('--no-ema', action='store_true', help='pass over averaged weights')
    parser.add_argument(
        '--model-args', metavar='JSON', default='{}',
        help='further arguments of the model, such as \'{"img_size": 384}\'')
    parser.add_argument('--name', help='of the model in its card (default: that of the folder)')
    parser.add_argument('--tag', help='what the weights were trained by and on, such as damo_in1k')
    parser.add_argument('--license', help='of the weights (default: the authors\' for theirs, else unknown)')
    args = parser.parse_args(argv)
    try:
        model_args = json.loads(args.model_args)
        if not isinstance(model_args, dict):
            raise ValueError('not an object')
    except ValueError as e:
        parser.error(f'--model-args: got {args.model_args!r} ({e}), must be a JSON object')
    try:
        conversion = convert(args.checkpoint, args.architecture, args.kind, not args.no_ema, model_args)
        print(conversion.report)
        folder = save(conversion, args.folder, args.checkpoint, args.name, args.tag, args.license)
    except (WeightsError, OutputError, OSError, ValueError, TypeError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print(conversion.summary)
    print(f'saved {folder}; load it with:')
    print(f"  import elsa_models, timm; timm.create_model('local-dir:{folder}', pretrained=True)")
    return 0
