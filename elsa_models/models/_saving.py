"""Saving models as folders that timm reads."""
import json
from pathlib import Path
from typing import Any, Dict, Optional, Union

import torch.nn as nn
from timm.models import save_for_hf


def save_folder(
        model: nn.Module,
        folder: Union[str, Path],
        model_config: Dict[str, Any],
        data_config: Optional[Dict[str, Any]] = None,
) -> None:
    """Write model.safetensors and timm's config.json, which `timm.create_model('local-dir:FOLDER')` reads.

    Args:
        model: A model made by `timm.create_model`.
        folder: Folder to create or fill.
        model_config: Further entries of config.json, as `timm.models.save_for_hf` takes them.
        data_config: Preprocessing, that of the model if None.
    """
    save_for_hf(model, str(folder), model_config=model_config, safe_serialization=True, data_config=data_config)
    # timm writes num_classes at the top and among the arguments, and transformers' TimmWrapper refuses to get it twice
    path = Path(folder, 'config.json')
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')
