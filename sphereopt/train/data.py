"""Images to train on: scikit-learn's digits, a folder of idx files, or an npz file."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphereopt.train.config import OptionError

__all__ = ["Dataset", "load"]

_IDX = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_FORMATS = (
    f'use "digits", a folder with {_IDX["train_images"]}[.gz] and its three companions, or an .npz '
    f"with {', '.join(_IDX)}"
)
_TEST_SHARE = 0.2
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """Labelled images, in two parts.

    Attributes:
        name: Where they are from.
        train_images: Shape ``(n, channels, height, width)``, as stored (bytes or floats).
        train_labels: Shape ``(n,)``, integers from 0.
        test_images: Likewise.
        test_labels: Likewise.
        mean: Mean of the training images.
        std: Their standard deviation.
        classes: Number of classes.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: float
    std: float
    classes: int

    def normalized(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Return images of this set with the training images' mean and deviation taken out."""
        return (images.to(dtype) - self.mean) / self.std


def load(source: str) -> Dataset:
    """Return a data set.

    Args:
        source: ``"digits"`` (8x8 handwritten digits that scikit-learn ships; a fifth of every class
            is the test part, always the same), a folder of idx files as MNIST and Fashion-MNIST
            come in, or an ``.npz`` file.

    Returns:
        The images as they are stored, with the numbers to normalize them by.

    Raises:
        OptionError: If there is no such data, or it is not as it should be.
        ImportError: If the digits are asked for and scikit-learn is missing.

    Notes:
        The digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI
        Machine Learning Repository, 1998.
    """
    if source == "digits":
        arrays = _digits()
    else:
        path = Path(source)
        if path.is_dir():
            arrays = _idx_folder(source, path)
        elif path.is_file() and path.suffix == ".npz":
            arrays = _npz(source, path)
        elif path.exists():
            raise OptionError("data", source, f"is neither a folder nor an .npz file; {_FORMATS}")
        else:
            raise OptionError("data", source, f"there is no such folder or file; {_FORMATS}")
    return _checked(source, arrays)


def _digits() -> dict[str, np.ndarray[Any, Any]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images, digits.target
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = torch.randperm(len(members), generator=generator).numpy()
        held_out[members[order[: round(_TEST_SHARE * len(members))]]] = True
    return {
        "train_images": images[~held_out],
        "train_labels": labels[~held_out],
        "test_images": images[held_out],
        "test_labels": labels[held_out],
    }


def _idx_folder(source: str, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {}
    for key, stem in _IDX.items():
        found = [p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()]
        if not found:
            raise OptionError("data", source, f"the folder has no {stem}[.gz]; {_FORMATS}")
        try:
            content = found[0].read_bytes()
            if found[0].suffix == ".gz":
                content = gzip.decompress(content)
            arrays[key] = _parse_idx(content)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise OptionError(
                "data", source, f"{found[0].name} cannot be read ({error}); fetch it again"
            ) from None
    return arrays


def _parse_idx(content: bytes) -> np.ndarray[Any, Any]:
    """Return the array of an idx file: two zeros, type 8, rank, big-endian shape, bytes."""
    if content[:3] != b"\x00\x00\x08":
        raise ValueError("it is not an idx file of bytes")
    rank = content[3] if len(content) > 3 else 0
    start = 4 + 4 * rank
    if len(content) < start:
        raise ValueError("its header is cut off")
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(np.int64)
    values = np.frombuffer(content[start:], dtype=np.uint8)
    if values.size != shape.prod():
        raise ValueError(f"its header announces {shape.tolist()}, but it holds {values.size} bytes")
    return values.reshape(shape)


def _npz(source: str, path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        # Opened here: of a file that is cut off numpy would leave its own handle open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in _IDX}
    except KeyError as error:
        raise OptionError(
            "data", source, f"{str(error).strip(chr(34))}; it needs {', '.join(_IDX)}"
        ) from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise OptionError("data", source, f"cannot be read ({reason}); save it again") from None


def _checked(source: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Dataset:
    """Return the data set of four arrays that fit together, or raise."""
    try:
        tensors = {
            key: (_labels if "labels" in key else _images)(key, array)
            for key, array in arrays.items()
        }
        classes = int(tensors["train_labels"].max()) + 1
        for part in ("train", "test"):
            count, labels = len(tensors[f"{part}_images"]), tensors[f"{part}_labels"]
            if count != len(labels):
                raise ValueError(f"it has {count} {part} images but {len(labels)} {part} labels")
        if int(tensors["test_labels"].max()) >= classes or classes < 2:
            raise ValueError(f"training labels go to {classes - 1}; test labels must not go beyond")
        shapes = {tensors[key].shape[1:] for key in ("train_images", "test_images")}
        if len(shapes) > 1:
            raise ValueError("training and test images differ in size")
        values = tensors["train_images"].to(torch.float64)
        std = float(values.std())
        if not std > 0:
            raise ValueError("every pixel of the training images has the same value")
    except ValueError as error:
        raise OptionError("data", source, f"{error}; correct the file") from None
    return Dataset(name=source, **tensors, mean=float(values.mean()), std=std, classes=classes)


def _images(key: str, array: np.ndarray[Any, Any]) -> Tensor:
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(
            f"{key} has shape {array.shape}, not (n, height, width) or (n, channels, height, width)"
        )
    if array.dtype.kind not in "uif" or not np.isfinite(array).all():
        raise ValueError(f"{key} holds something other than finite numbers")
    # Bytes stay bytes (60,000 images in float64 are 376 MB); torch lacks the wider unsigned types.
    return torch.tensor(array if array.dtype == np.uint8 else array.astype(np.float64))


def _labels(key: str, array: np.ndarray[Any, Any]) -> Tensor:
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "ui":
        raise ValueError(f"{key} has shape {array.shape} and type {array.dtype}, not (n,) integers")
    if array.min() < 0 or array.max() > 10_000:
        raise ValueError(f"{key} must be class numbers from 0")
    return torch.tensor(array.astype(np.int64))
