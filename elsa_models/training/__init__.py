"""What the training script needs and timm does not have: recipe, data, loop, figures, and the run that joins them."""
from .._files import OutputError, replace_folder
from .config import Recipe, RecipeError, add_arguments, load_recipe
from .data import DataError, LabelledImages, create_loaders, load_splits
from .run import Result, run

__all__ = [
    'DataError', 'LabelledImages', 'OutputError', 'Recipe', 'RecipeError', 'Result', 'add_arguments',
    'create_loaders', 'load_recipe', 'load_splits', 'replace_folder', 'run',
]
