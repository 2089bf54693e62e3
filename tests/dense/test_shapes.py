"""Drawn shapes: the same every time, and annotated as they are seen."""
import numpy as np
import pytest

from elsa_models.dense.shapes import CLASSES, Shapes, boxes_of


def test_a_scene_depends_on_its_number_and_the_seed_alone():
    data = Shapes(40, 64)
    a, b = data[7], Shapes(8, 64)[7]
    assert a.image.tobytes() == b.image.tobytes() and np.array_equal(a.masks, b.masks)
    assert a.image.tobytes() != data[8].image.tobytes() != Shapes(40, 64, seed=1)[8].image.tobytes()


def test_scenes_are_varied_and_masks_are_disjoint():
    scenes = [Shapes(120, 64)[i] for i in range(120)]
    numbers = [len(s.labels) for s in scenes]
    assert set(numbers) == {0, 1, 2, 3, 4} and numbers.count(0) < 15
    counts = np.bincount(np.concatenate([s.labels for s in scenes]), minlength=len(CLASSES))
    assert counts.min() > 50
    for s in scenes:
        assert s.masks.shape == (len(s.labels), 64, 64) and s.masks.sum(0).max(initial=0) <= 1
        assert s.image.size == (64, 64)


def test_objects_can_be_seen():
    """Inside a mask the picture differs from that outside it, on average by more than the noise."""
    contrasts = []
    for scene in (Shapes(30, 64)[i] for i in range(30)):
        image = np.asarray(scene.image, dtype=float)
        for mask in scene.masks:
            contrasts.append(np.abs(image[mask].mean(0) - image[~scene.masks.any(0)].mean(0)).max())
    assert np.median(contrasts) > 40


def test_boxes_hold_their_masks():
    masks = np.zeros((2, 20, 30), bool)
    masks[0, 3:9, 4:11] = True
    masks[1, 19, 29] = True
    assert boxes_of(masks).tolist() == [[4, 3, 11, 9], [29, 19, 30, 20]]
    assert boxes_of(masks[:0]).shape == (0, 4)


def test_no_object_is_all_but_hidden():
    for scene in (Shapes(60, 64, max_objects=6)[i] for i in range(60)):
        boxes = boxes_of(scene.masks)
        assert (boxes[:, 2:] - boxes[:, :2] >= 6).all()


@pytest.mark.parametrize('name', ['number', 'size', 'max_objects'])
def test_bad_arguments_are_named(name):
    with pytest.raises(ValueError, match=f'{name}: got 0'):
        Shapes(**{'number': 1, name: 0})


def test_there_is_an_end():
    data = Shapes(2)
    assert len(data) == 2
    with pytest.raises(IndexError):
        data[2]
