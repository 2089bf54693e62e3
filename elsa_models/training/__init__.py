"""What the training scripts need and timm does not have: recipes, jobs, data, the loop, and the run that joins them."""
from .._files import OutputError, replace_folder
from .._images import DataError
from ..inference.classifier import create_eval_transform
from .config import BaseRecipe, ImageValues, Recipe, RecipeError, Validation, Values, add_arguments, load_recipe
from .data import LabelledImages, create_train_transform, load_splits
from .job import Job
from .jobs.classification import ClassificationJob
from .loading import EvalLoader, TrainLoader
from .loop import DivergedError, Trainer
from .run import Result, run_job
from .world import World

__all__ = [
    'BaseRecipe', 'ClassificationJob', 'DataError', 'DivergedError', 'EvalLoader', 'ImageValues', 'Job',
    'LabelledImages', 'OutputError', 'Recipe', 'RecipeError', 'Result', 'TrainLoader', 'Trainer', 'Validation',
    'Values', 'World', 'add_arguments', 'create_eval_transform', 'create_train_transform', 'load_recipe',
    'load_splits', 'replace_folder', 'run_job',
]
