"""Holds what the torchvision data sets share: normalisation, augmentation, and the message when one is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moda.data.splits import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """A downloadable data set's place and origin.

    Attributes:
        title: the data set's usual name.
        place: the file or folder that must be there.
        archives: the files to fetch.
        instruction: what to do with those files.
    """

    title: str
    place: Path
    archives: str
    instruction: str

    def open(self, read: Callable[[], Any], download: bool) -> Any:
        """Call `read()` and explain its failures.

        Raises:
            FileNotFoundError: the data set is not there.
            ValueError: what is there is not the data set.
            OSError: it could not be downloaded.
        """
        try:
            return read()
        except RuntimeError as error:  # torchvision raises it for missing files and for wrong checksums
            if self.place.exists():
                raise ValueError(
                    f"{self.title}: {self.place} is incomplete or not the published data (checksum differs); "
                    f"remove it and fetch it again: {self.archives}"
                ) from error
            raise FileNotFoundError(
                f"{self.title}: {self.place} is not there. Fetch {self.archives} and {self.instruction}, "
                "or ask for the download (download=True)"
            ) from error
        except OSError as error:
            if not download:
                raise
            raise OSError(f"{self.title}: cannot download {self.archives}: {error}") from error


def small_image_transforms(
    data_set: str, mean: tuple[float, float, float], std: tuple[float, float, float], augment: bool
) -> tuple[Any, Any]:
    """Return the transforms of training and of evaluation for 32x32 images.

    Augmentation is the published one: a random 32x32 crop after padding by 4 zeros, and a random horizontal flip.
    """
    transforms = require("torchvision.transforms", data_set, "vision")
    plain = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    evaluation = transforms.Compose(plain)
    if not augment:
        return evaluation, evaluation
    augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*augmentation, *plain]), evaluation
