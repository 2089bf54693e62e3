import pytest
from PIL import Image


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of eight pictures: red and blue squares of changing brightness and size."""
    folder = tmp_path / 'pictures'
    for name, channel in (('red', 0), ('blue', 2)):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            color = [0, 0, 0]
            color[channel] = 120 + 15 * i
            Image.new('RGB', (20 + i, 30), tuple(color)).save(folder / name / f'{i}.png')
    return folder
