"""The data sets: the real digits, and the published formats read from tiny files written here."""

from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from moda import data
from moda.data.imagefolder import read_class_list
from moda.data.splits import require

# ---- digits ----------------------------------------------------------------------------------------------------


def labels_of(split: Dataset) -> list[int]:
    return [split[index][1] for index in range(len(split))]


def test_digits_are_scikit_learns_scaled_to_one():
    from sklearn.datasets import load_digits

    splits = data.load("digits", seed=3)
    assert (len(splits.train), len(splits.test)) == (1437, 360)
    assert (splits.num_classes, splits.input_shape) == (10, (3, 8, 8))
    assert splits.class_names == tuple("0123456789")
    image, label = splits.train[0]
    assert image.dtype == torch.float32
    assert type(label) is int
    assert torch.equal(image[0], image[2])
    seen = {(image[0].numpy().tobytes(), label) for split in (splits.train, splits.test) for image, label in split}
    digits = load_digits()
    raw = {(pic.astype(np.float32).tobytes(), int(k)) for pic, k in zip(digits.images / 16, digits.target, strict=True)}
    assert seen == raw


def test_digits_are_split_with_equal_shares_by_seed():
    splits, again, other = (data.load("digits", seed=seed) for seed in (0, 0, 1))
    everything = np.bincount(labels_of(splits.train)) + np.bincount(labels_of(splits.test))
    assert np.abs(np.bincount(labels_of(splits.test)) - everything / 5).max() <= 1
    assert torch.equal(splits.train.tensors[0], again.train.tensors[0])
    assert not torch.equal(splits.train.tensors[0], other.train.tensors[0])


def test_digits_take_channels_and_size():
    splits = data.load("digits", channels=1, image_size=32)
    assert splits.input_shape == (1, 32, 32)
    small, large = data.load("digits", channels=1).test[5][0], splits.test[5][0]
    position = ((torch.arange(32) + 0.5) / 4 - 0.5).clamp(0, 7)  # of each new pixel, in old ones
    weights = (1 - (position[:, None] - torch.arange(8)).abs()).clamp(min=0)
    torch.testing.assert_close(large[0], weights @ small[0] @ weights.T)


def test_digits_come_one_by_one_and_in_batches():
    train = data.load("digits").train
    indices = torch.tensor([7, 2, 9])
    images, labels = train[indices]
    for row, index in enumerate(indices.tolist()):
        assert torch.equal(images[row], train[index][0])
        assert labels[row] == train[index][1]
    images, labels = next(iter(DataLoader(train, batch_size=4)))
    assert images.shape == (4, 3, 8, 8)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"channels": 0}, ValueError, "channels: expected at least 1, got 0"),
        ({"image_size": 8.0}, TypeError, "image_size: expected an int, got float"),
        ({"augment": True, "size": 1}, TypeError, "options: digits takes seed, channels, image_size, got augment, si"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        data.load("digits", **options)


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match="name: expected one of digits, cifar10, .*, imagefolder, got 'mnist'"):
        data.load("mnist")


# ---- tiny files in the published formats -----------------------------------------------------------------------
#
# torchvision accepts only the published files, by their MD5. Its table of sums gets those of the tiny files here, so
# that its own check runs, and the reading of the real format with it.


def pictures(count: int, seed: int) -> np.ndarray:
    """(count, 32, 32, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def cifar_rows(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Root of a CIFAR-10 of 5 x 4 training images and 3 test images; the images, in order."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    train, test = pictures(20, seed=1), pictures(3, seed=2)
    sums = []
    for batch in range(5):
        rows = cifar_rows(train[4 * batch : 4 * batch + 4])
        content = {"data": rows, "labels": [(4 * batch + i) % 10 for i in range(4)]}
        sums.append([f"data_batch_{batch + 1}", write(folder / f"data_batch_{batch + 1}", pickle.dumps(content))])
    test_sum = write(folder / "test_batch", pickle.dumps({"data": cifar_rows(test), "labels": [9, 0, 4]}))
    names = [f"thing{k}" for k in range(10)]
    meta_sum = write(folder / "batches.meta", pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", sums)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", test_sum]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta_sum})
    return tmp_path, train, test


def normalised(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, 3, H, W), by the definition."""
    return ((images / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)


CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR100_STATISTICS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images_of(split: Dataset) -> np.ndarray:
    return np.stack([split[index][0].numpy() for index in range(len(split))])


def test_cifar10_is_read_and_normalised(cifar10):
    root, train, test = cifar10
    splits = data.load("cifar10", root)
    assert (splits.num_classes, splits.input_shape) == (10, (3, 32, 32))
    assert splits.class_names == tuple(f"thing{k}" for k in range(10))
    assert labels_of(splits.train) == labels_of(splits.train_eval) == [i % 10 for i in range(20)]
    assert labels_of(splits.test) == [9, 0, 4]
    np.testing.assert_allclose(images_of(splits.test), normalised(test, *CIFAR10_STATISTICS), atol=1e-5)
    np.testing.assert_allclose(images_of(splits.train_eval), normalised(train, *CIFAR10_STATISTICS), atol=1e-5)


def augmentations(image: np.ndarray) -> list[np.ndarray]:
    """All that a crop of the image padded by 4 and a flip can give: 9 x 9 x 2 images."""
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    return [*crops, *(crop[:, ::-1] for crop in crops)]


def test_training_images_are_cropped_and_flipped_at_random(cifar10):
    root, train, _ = cifar10
    split = data.load("cifar10", root).train
    mean, std = (np.array(values)[:, None, None] for values in CIFAR10_STATISTICS)
    possible = {np.ascontiguousarray(candidate).tobytes() for candidate in augmentations(train[0])}
    assert len(possible) == 162
    seen = set()
    for _ in range(40):
        pixels = np.rint((split[0][0].numpy() * std + mean) * 255).astype(np.uint8)
        seen.add(np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes())
    assert seen <= possible
    assert len(seen) > 20


def test_augmentation_can_be_switched_off(cifar10):
    root, train, _ = cifar10
    split = data.load("cifar10", root, augment=False).train
    np.testing.assert_allclose(images_of(split), normalised(train, *CIFAR10_STATISTICS), atol=1e-5)


def test_firing_rates_are_counted_without_augmentation_unless_asked(cifar10):
    root, _, _ = cifar10
    splits = data.load("cifar10", root)
    assert splits.for_firing_rates() is splits.train_eval
    assert splits.for_firing_rates(augmented=True) is splits.train
    assert torch.equal(splits.train_eval[3][0], splits.train_eval[3][0])


def test_loader_processes_get_the_same_images(cifar10):
    root, _, test = cifar10
    splits = data.load("cifar10", root)
    images, labels = next(iter(DataLoader(splits.test, batch_size=3, num_workers=1)))
    np.testing.assert_allclose(images.numpy(), normalised(test, *CIFAR10_STATISTICS), atol=1e-5)
    assert labels.tolist() == [9, 0, 4]


def test_cifar100_is_read_with_its_fine_classes(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    train, test = pictures(4, seed=3), pictures(2, seed=4)
    names = [f"fine{k}" for k in range(100)]
    sums = {}
    for name, images, labels in (("train", train, [99, 3, 7, 0]), ("test", test, [50, 98])):
        content = {"data": cifar_rows(images), "fine_labels": labels, "coarse_labels": [1] * len(labels)}
        sums[name] = write(tmp_path / "cifar-100-python" / name, pickle.dumps(content))
    meta = {"fine_label_names": names, "coarse_label_names": ["coarse"]}
    sums["meta"] = write(tmp_path / "cifar-100-python" / "meta", pickle.dumps(meta))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    splits = data.load("cifar100", tmp_path)
    assert (splits.num_classes, splits.class_names) == (100, tuple(names))
    assert labels_of(splits.train_eval) == [99, 3, 7, 0]
    assert labels_of(splits.test) == [50, 98]
    np.testing.assert_allclose(images_of(splits.test), normalised(test, *CIFAR100_STATISTICS), atol=1e-5)
    np.testing.assert_allclose(images_of(splits.train_eval), normalised(train, *CIFAR100_STATISTICS), atol=1e-5)


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """Root of an SVHN of 5 training and 2 test images; the images."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    files = dict(SVHN.split_list)
    images = {"train": pictures(5, seed=5), "test": pictures(2, seed=6)}
    labels = {"train": [10, 1, 9, 10, 4], "test": [3, 10]}  # the format's 10 is the digit 0
    for split in images:
        url, name, _ = files[split]
        path = tmp_path / name
        savemat(path, {"X": images[split].transpose(1, 2, 3, 0), "y": np.array(labels[split], np.uint8)[:, None]})
        files[split] = [url, name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", files)
    return tmp_path, images


def test_svhn_is_read_with_digit_0_as_class_0(svhn):
    root, images = svhn
    splits = data.load("svhn", root)
    assert (splits.num_classes, splits.input_shape) == (10, (3, 32, 32))
    assert labels_of(splits.train_eval) == [0, 1, 9, 0, 4]
    assert labels_of(splits.test) == [3, 0]
    np.testing.assert_allclose(images_of(splits.test), normalised(images["test"], *IMAGENET_STATISTICS), atol=1e-5)
    augmented = [splits.train[1][0] for _ in range(8)]
    assert len({tuple(image.flatten().tolist()) for image in augmented}) > 1


# ---- data sets that are not there ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "archive"),
    [
        ("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz and unpack it in"),
        ("cifar100", "cifar-100-python", "cifar-100-python.tar.gz and unpack it in"),
        ("svhn", "train_32x32.mat", "train_32x32.mat and put it in"),
    ],
)
def test_a_missing_data_set_says_what_to_put_where(tmp_path, name, place, archive):
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / place} is not there" in message
    assert archive in message
    assert "download=True" in message


def test_a_damaged_file_is_not_read(cifar10):
    root, _, _ = cifar10
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"CIFAR-10: .*cifar-10-batches-py is incomplete or not the published data"):
        data.load("cifar10", root)


def test_a_missing_test_file_is_named(svhn):
    root, _ = svhn
    (root / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"SVHN \(test\): .*test_32x32.mat is not there"):
        data.load("svhn", root)


def test_a_failed_download_says_what_could_not_be_had(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "nowhere" / "cifar-10-python.tar.gz").as_uri())
    with pytest.raises(OSError, match=r"CIFAR-10: cannot download file:.*cifar-10-python\.tar\.gz"):
        data.load("cifar10", tmp_path / "root", download=True)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("cifar10", "torchvision", "vision"),
        ("cifar100", "torchvision", "vision"),
        ("svhn", "torchvision", "vision"),
        ("svhn", "scipy", "vision"),
        ("imagefolder", "torchvision", "vision"),
        ("digits", "sklearn", "train"),
    ],
)
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, name, package, extra):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"data set '{name}' needs {package}.*pip install moda-kernels\[{extra}\]"):
        data.load(name, tmp_path)


def test_a_package_built_for_another_torch_is_named(tmp_path, monkeypatch):
    (tmp_path / "misfit.py").write_text("raise RuntimeError('operator misfit::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"needs misfit, which does not fit the torch .* \(operator misfit::nms does"):
        require("misfit", "cifar10", "vision")


# ---- image folders ---------------------------------------------------------------------------------------------

COLOURS = {"n03": (200, 10, 30), "n01": (20, 180, 90), "n02": (60, 70, 250)}


@pytest.fixture
def image_folder(tmp_path):
    """Folders of three classes, each image of one colour: 2 per class to train, 1 to validate, 300 x 260 pixels."""
    from PIL import Image

    for split, count in (("train", 2), ("val", 1)):
        for name, colour in COLOURS.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (300, 260), colour).save(folder / f"{index}.png")
    return tmp_path


def test_image_folders_are_read_in_the_order_of_their_names(image_folder):
    splits = data.load("imagefolder", image_folder)
    assert splits.class_names == ("n01", "n02", "n03")
    assert (splits.num_classes, splits.input_shape) == (3, (3, 224, 224))
    assert labels_of(splits.train) == [0, 0, 1, 1, 2, 2]
    assert labels_of(splits.test) == [0, 1, 2]
    for split, step in ((splits.train, 2), (splits.test, 1)):
        for label, name in enumerate(sorted(COLOURS)):
            image = split[step * label][0]
            expected = normalised(np.array(COLOURS[name])[None, None, None], *IMAGENET_STATISTICS)[0]
            np.testing.assert_allclose(image.numpy(), np.broadcast_to(expected, (3, 224, 224)), atol=1e-5)


def test_a_class_list_takes_its_classes_and_gives_their_names(image_folder):
    class_list = image_folder / "classes.txt"
    class_list.write_text("n03 kite, a bird\n\nn01\n", encoding="utf-8")
    splits = data.load("imagefolder", image_folder, class_list=class_list)
    assert splits.class_names == ("n01", "kite, a bird")
    assert labels_of(splits.train) == [0, 0, 1, 1]
    expected = normalised(np.array(COLOURS["n03"])[None, None, None], *IMAGENET_STATISTICS)[0]
    np.testing.assert_allclose(splits.test[1][0].numpy()[:, :1, :1], expected, atol=1e-5)


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    from PIL import Image

    edge = np.zeros((256, 512, 3), np.uint8)  # at 256 -> 224 nothing is resampled: the crop is exact
    edge[:, :, 0] = np.arange(512) // 2
    edge[:, :, 1] = np.arange(256)[:, None]
    for split in ("train", "val"):
        (tmp_path / split / "n").mkdir(parents=True)
        Image.fromarray(edge).save(tmp_path / split / "n" / "0.png")
    splits = data.load("imagefolder", tmp_path)
    expected = normalised(edge[None, 16:240, 144:368], *IMAGENET_STATISTICS)[0]
    np.testing.assert_allclose(splits.test[0][0].numpy(), expected, atol=1e-5)
    assert data.load("imagefolder", tmp_path, image_size=64).test[0][0].shape == (3, 64, 64)


def test_image_folders_are_augmented_only_on_request(image_folder):
    from PIL import Image

    gradient = np.zeros((100, 100, 3), np.uint8)
    gradient[:, :, 0] = np.arange(100)
    Image.fromarray(gradient).save(image_folder / "train" / "n01" / "0.png")
    plain = data.load("imagefolder", image_folder, image_size=32)
    assert torch.equal(plain.train[0][0], plain.train_eval[0][0])
    augmented = data.load("imagefolder", image_folder, image_size=32, augment=True)
    draws = torch.stack([augmented.train[0][0] for _ in range(12)])
    assert len(draws[:, 0].flatten(1).unique(dim=0)) > 6
    slopes = draws[:, 0, 0, -1] - draws[:, 0, 0, 0]
    assert (slopes > 0).any()
    assert (slopes < 0).any()  # some are flipped
    assert torch.equal(augmented.train_eval[0][0], plain.train_eval[0][0])


def test_a_missing_image_folder_says_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root: .*/train is not there; expected .*/train/<class>/\*\.jpg and"):
        data.load("imagefolder", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"root: .*/train holds no class folders"):
        data.load("imagefolder", tmp_path)


def test_missing_classes_are_named(image_folder):
    class_list = image_folder / "classes.txt"
    class_list.write_text("\n".join(["n01 a", *(f"x{i} b" for i in range(7))]))
    with pytest.raises(FileNotFoundError, match=r"/train lacks the class folders x0, x1, x2, x3, x4 and 2 more"):
        data.load("imagefolder", image_folder, class_list=class_list)
    (image_folder / "val" / "n02" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"root: .*/val: .* n02"):
        data.load("imagefolder", image_folder)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "class_list: .*classes.txt is not there"),
        ("\n \n", ValueError, r"class_list: .*classes.txt names no class; expected lines of `<folder> <name>`"),
        ("a x\nb y\na z\n", ValueError, "class_list: .*classes.txt, line 3: a occurs a second time"),
    ],
)
def test_a_bad_class_list_is_named(tmp_path, text, error, message):
    path = tmp_path / "classes.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message):
        read_class_list(path)


def test_a_root_in_the_home_folder_is_found(image_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(image_folder.parent))
    assert data.load("imagefolder", f"~/{image_folder.name}").num_classes == 3
