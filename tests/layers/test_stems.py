import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near
from timm.models.swin_transformer import PatchMerging

from elsa_models.layers import PaddedPatchEmbed, PaddedPatchMerging, sizes
from elsa_models.layers.sizes import resample_positions


def _embed(img_size, patch_size=4, **kwargs):
    return PaddedPatchEmbed(img_size, patch_size, in_chans=3, embed_dim=8, output_fmt='NHWC', **kwargs).double()


@pytest.mark.parametrize('img_size, grid', [
    (32, (8, 8)), (33, (9, 9)), ((47, 65), (12, 17)), ((1, 4), (1, 1)), ((225, 231), (57, 58)), (3, (1, 1)),
])
def test_grid_counts_padded_patches(img_size, grid):
    embed = _embed(img_size)
    assert embed.grid_size == grid and embed.num_patches == grid[0] * grid[1]
    H, W = embed.img_size
    assert embed(torch.randn(2, 3, H, W, dtype=torch.float64)).shape == (2, *grid, 8)


@pytest.mark.parametrize('height, width', [(32, 32), (33, 34), (47, 65), (1, 1)])
def test_pads_zeros_right_and_below(height, width):
    embed = _embed((height, width))
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    padded = F.pad(x, (0, -width % 4, 0, -height % 4))
    expected = F.conv2d(padded, embed.proj.weight, embed.proj.bias, stride=4).permute(0, 2, 3, 1)
    assert_near(embed(x), expected, 1e-12)


def test_patches_that_are_no_squares():
    embed = _embed((10, 10), patch_size=(4, 3))
    assert embed.grid_size == (3, 4)
    assert embed(torch.zeros(1, 3, 10, 10, dtype=torch.float64)).shape == (1, 3, 4, 8)


def test_strict_size():
    embed = _embed(33)
    with pytest.raises(ValueError, match=r'^input: got 32 x 33 pixels, must be 33 x 33'):
        embed(torch.zeros(1, 3, 32, 33, dtype=torch.float64))
    with pytest.raises(ValueError, match=r'^input: got 33 x 37 pixels'):
        embed(torch.zeros(1, 3, 33, 37, dtype=torch.float64))
    embed = _embed(33, strict_img_size=False)
    assert embed(torch.zeros(1, 3, 30, 37, dtype=torch.float64)).shape == (1, 8, 10, 8)


def test_set_input_size():
    embed = _embed(32)
    embed.set_input_size(img_size=(35, 41))
    assert embed.grid_size == (9, 11) and embed.num_patches == 99
    assert embed(torch.zeros(1, 3, 35, 41, dtype=torch.float64)).shape == (1, 9, 11, 8)


@pytest.mark.parametrize('img_size', [0, -4, (32, 0), (32, 32, 32)])
def test_bad_size_is_named(img_size):
    with pytest.raises(ValueError, match=r'^img_size: got '):
        _embed(img_size)


@pytest.mark.parametrize('height, width', [(8, 6), (7, 5), (1, 1), (1, 4), (3, 2)])
def test_merging_equals_that_of_timm(height, width):
    torch.manual_seed(0)
    merging, timms = PaddedPatchMerging(6, 10).double(), PatchMerging(6, 10).double()
    timms.load_state_dict(merging.state_dict())
    x = torch.randn(2, height, width, 6, dtype=torch.float64)
    y = merging(x)
    assert y.shape == (2, (height + 1) // 2, (width + 1) // 2, 10)
    assert_near(y, timms(x), 1e-12)


@pytest.mark.parametrize('part', ['embed', 'merging'])
def test_script(part):
    module = _embed(32, strict_img_size=False) if part == 'embed' else PaddedPatchMerging(3, 6).double()
    scripted = torch.jit.script(module)
    for height, width in ((8, 8), (5, 7), (1, 2)):
        shape = (2, 3, height, width) if part == 'embed' else (2, height, width, 3)
        x = torch.randn(shape, dtype=torch.float64)
        assert_near(scripted(x), module(x), 1e-12)


@pytest.mark.parametrize('size', [(14, 14), (5, 12), (28, 31), (13, 3), (1, 40)])
def test_positions_are_resampled_alike_in_exports(monkeypatch, size):
    positions = torch.randn(1, 14, 9, 8)
    expected = resample_positions(positions, *size)
    monkeypatch.setattr(sizes, 'is_exporting', lambda: True)
    assert_near(resample_positions(positions, *size), expected, 1e-5)


def test_positions_are_resampled_in_compiled_graphs_as_in_eager_mode(fresh_compiler):
    # PyTorch 2.7 to 2.11 fold `is_exporting` to true wherever torch.compile sees it
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(resample_positions, backend=keep, fullgraph=True)(torch.randn(1, 6, 5, 4), 7, 8)
    assert 'interpolate' in str(graphs[0].graph)
