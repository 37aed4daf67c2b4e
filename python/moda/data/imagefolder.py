"""Loads folders of images, one folder per class, optionally only listed classes (ImageNet100R, ImageNet100D)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from moda.checks import check_count
from moda.data.splits import DataSplits, Transformed, require
from moda.data.vision import IMAGENET_MEAN, IMAGENET_STD
from moda.files import read_bytes

LARGEST_LIST = 1 << 24
"""Bytes of a list of classes at most."""
_RESIZE_OVER_CROP = 256 / 224


class _Pictures(Dataset[Any]):
    """A data set of (RGB picture, class) from files."""

    def __init__(self, samples: list[tuple[str, int]], read: Any) -> None:
        self.samples = samples
        self.read = read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.read(path), label


def load(
    root: Path, *, class_list: str | Path | None = None, image_size: int = 224, augment: bool = False
) -> DataSplits:
    """Load images from `<root>/train/<class>/` and `<root>/val/<class>/`.

    Classes are numbered by folder name in sorted order, whatever the order of the list. Evaluation resizes the shorter
    side to 256/224 of `image_size` and crops the centre.

    Args:
        root: folder that holds `train` and `val`.
        class_list: text file of the classes to take, one `<folder> <name>` per line; None takes all folders.
        image_size: height and width that the model gets.
        augment: crop, resize and flip training images at random. Off by default, as in the published trainings.

    Raises:
        FileNotFoundError: a folder, a class's images or the list is not there.
        ValueError: the list is malformed.
        ImportError: torchvision is missing.
    """
    check_count("image_size", image_size)
    folders = require("torchvision.datasets.folder", "imagefolder", "vision")
    names = _all_classes(root / "train") if class_list is None else read_class_list(Path(class_list))
    augmented, plain = _transforms(image_size, augment)
    train, test = (_pictures(folders, root / split, sorted(names)) for split in ("train", "val"))
    return DataSplits(
        train=Transformed(train, augmented),
        train_eval=Transformed(train, plain),
        test=Transformed(test, plain),
        num_classes=len(names),
        class_names=tuple(names[folder] for folder in sorted(names)),
        input_shape=(3, image_size, image_size),
    )


def read_class_list(path: Path) -> dict[str, str]:
    """Read a mapping of folder to class name from lines of `<folder> <name>`.

    The name may hold spaces; without one it is the folder's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no class, one twice, or what is no folder's name.
    """
    if not path.exists():
        raise FileNotFoundError(f"class_list: {path} is not there")
    try:
        lines = read_bytes(path, LARGEST_LIST).decode("utf-8").splitlines()
    except ValueError as error:
        raise ValueError(f"class_list: {path} is no list of classes: {error}") from None
    names: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        folder, _, name = line.strip().partition(" ")
        if not folder:
            continue
        if folder in (".", "..") or "/" in folder or "\\" in folder or "\0" in folder:
            raise ValueError(f"class_list: {path}, line {number}: expected the name of a folder, got {folder!r:.80}")
        if folder in names:
            raise ValueError(f"class_list: {path}, line {number}: {folder:.80} occurs a second time")
        names[folder] = name.strip() or folder
    if not names:
        raise ValueError(f"class_list: {path} names no class; expected lines of `<folder> <name>`")
    return names


def _all_classes(folder: Path) -> dict[str, str]:
    _check_folder(folder)
    names = {entry.name: entry.name for entry in folder.iterdir() if entry.is_dir()}
    if not names:
        raise FileNotFoundError(f"root: {folder} holds no class folders")
    return names


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"root: {folder} is not there; expected {folder.parent}/train/<class>/*.jpg and "
            f"{folder.parent}/val/<class>/*.jpg (ImageNet: unpack ILSVRC2012_img_train.tar and "
            "ILSVRC2012_img_val.tar so, one folder per class)"
        )


def _pictures(folders: Any, folder: Path, classes: list[str]) -> _Pictures:
    _check_folder(folder)
    missing = [name for name in classes if not (folder / name).is_dir()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(f"root: {folder} lacks the class folders {', '.join(missing[:5])}{more}")
    numbers = {name: number for number, name in enumerate(classes)}
    try:
        samples = folders.make_dataset(str(folder), numbers, extensions=folders.IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"root: {folder}: {error}") from None
    return _Pictures(samples, folders.default_loader)


def _transforms(image_size: int, augment: bool) -> tuple[Any, Any]:
    transforms = require("torchvision.transforms", "imagefolder", "vision")
    plain = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    crop = [transforms.Resize(round(image_size * _RESIZE_OVER_CROP)), transforms.CenterCrop(image_size)]
    evaluation = transforms.Compose([*crop, *plain])
    if not augment:
        return evaluation, evaluation
    random_crop = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*random_crop, *plain]), evaluation
