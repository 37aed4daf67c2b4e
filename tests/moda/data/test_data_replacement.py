from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

import moda
from moda.data.replacement import labels_of, replacement_part
from moda.data.splits import Transformed


@pytest.fixture(scope="module")
def digits():
    return moda.data.load("digits")


def classes_of(dataset):
    return [label for _, label in (dataset[i] for i in range(len(dataset)))]


def test_strong_part_is_the_first_half(digits):
    strong = replacement_part(digits, "strong", 3)
    assert strong.num_classes == 5
    assert strong.class_names == digits.class_names[:5]
    for name in ("train", "train_eval", "test"):
        whole, part = getattr(digits, name), getattr(strong, name)
        expected = [i for i, label in enumerate(classes_of(whole)) if label < 5]
        assert len(part) == len(expected)
        assert torch.equal(part[7][0], whole[expected[7]][0])
        assert part[7][1] == whole[expected[7]][1]


def test_weak_part_mixes_one_strong_class_in_last(digits):
    weak = replacement_part(digits, "weak", 3)
    assert weak.num_classes == 6
    assert weak.class_names == (*digits.class_names[5:], digits.class_names[3])
    whole = Counter(classes_of(digits.train))
    drawn = Counter(classes_of(weak.train))
    assert drawn == {i: int(0.1 * whole[k]) for i, k in enumerate([5, 6, 7, 8, 9, 3])}
    assert weak.train is weak.train_eval  # not augmented
    tested = Counter(classes_of(digits.test))
    assert Counter(classes_of(weak.test)) == {i: tested[k] for i, k in enumerate([5, 6, 7, 8, 9, 3])}
    originals = {image.numpy().tobytes(): label for image, label in (digits.train[i] for i in range(len(digits.train)))}
    for image, label in (weak.train[i] for i in range(len(weak.train))):
        assert originals[image.numpy().tobytes()] == [5, 6, 7, 8, 9, 3][label]


def test_seed_decides_the_weak_samples(digits):
    one, same, other = (replacement_part(digits, "weak", 0, seed=seed).train.tensors[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


class Pictures:
    """As torchvision's data sets: targets apart, and reading a picture counts."""

    def __init__(self, name):
        setattr(self, name, [0, 1, 2, 3] * 10)
        self.read = 0

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.read += 1
        return torch.full((1, 2, 2), float(index)), index % 4


@pytest.mark.parametrize("name", ["targets", "labels"])
def test_pictures_are_read_only_when_asked_for(name):
    pictures = Pictures(name)
    data = moda.data.DataSplits(*[Transformed(pictures, lambda x: x + 0.5)] * 3, 4, ("a", "b", "c", "d"), (1, 2, 2))
    weak = replacement_part(data, "weak", 1, fraction=0.5)
    assert pictures.read == 0
    assert Counter(classes_of(weak.train)) == {0: 5, 1: 5, 2: 5}
    image, label = weak.train[0]
    assert [2, 3, 1][label] == (image[0, 0, 0].item() - 0.5) % 4


def test_labels_of_a_plain_data_set():
    assert labels_of([(torch.zeros(1), 3), (torch.zeros(1), 1)]).tolist() == [3, 1]


def test_part_by_name_through_load():
    weak = moda.data.load("digits", replacement={"part": "weak", "mixed_class": 2})
    assert weak.num_classes == 6
    with pytest.raises(TypeError, match="replacement: expected a mapping with part and mixed_class of"):
        moda.data.load("digits", replacement={"side": "weak"})


@pytest.mark.parametrize(
    ("part", "mixed_class", "fraction", "message"),
    [
        ("both", 0, 0.1, "part: expected one of strong, weak, got 'both'"),
        ("weak", 5, 0.1, "mixed_class: expected a strong class, in [0, 5), got 5"),
        ("weak", 0, 0.0, "fraction: expected a finite number greater than 0 and of at most 1, got 0.0"),
    ],
)
def test_bad_input_is_named(digits, part, mixed_class, fraction, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replacement_part(digits, part, mixed_class, fraction=fraction)
