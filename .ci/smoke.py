"""What a fresh install with the core dependencies must do."""
import timm
import torch

import elsa_models

names = [n for n in timm.list_models('test_*') if timm.models.model_entrypoint(n).__module__.startswith('elsa_models.')]
assert len(names) >= 2, names
for name in names:
    model = timm.create_model(name, num_classes=3)
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    model(x).sum().backward()
    maps = timm.create_model(name, features_only=True).eval()(x)
    assert len(maps) >= 3, name
    timm.models.save_for_hf(model, name)
    again = timm.create_model(f'local-dir:{name}', pretrained=True)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values())), name
print(elsa_models.__version__, *names)
