"""Sources: data sets in the formats they are published in, read as uint8 images and int64 labels."""
import gzip
import hashlib
import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hpcfl.data import classes
from hpcfl.errors import DataError
from hpcfl.wording import cause_text, count_text, list_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
GREY_MODES = ("1", "L")                                            # Pillow's names; a data set of only these keeps one channel
HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")                  # systems leave these in folders and archives, beside names that begin with a dot
COLOUR_MODES = ("RGB", "P", "RGBA", "CMYK", "YCbCr", "LA")         # become RGB; transparency is dropped
DAMAGED = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, MemoryError, SyntaxError)


@dataclass(frozen=True, eq=False)
class Labelled:
    """A data set in memory: images uint8 (N, C, H, W), labels int64 (N,) in [0, classes), for training and test."""

    train_images: np.ndarray                                       # (N, C, H, W) uint8
    train_labels: np.ndarray                                       # (N,) int64
    test_images: np.ndarray                                        # (M, C, H, W) uint8
    test_labels: np.ndarray                                        # (M,) int64
    classes: int
    names: tuple[str, ...] = ()                                    # (classes,); empty: their numbers
    notes: tuple[str, ...] = ()                                    # what differs from the source, a clause each


@dataclass(frozen=True)
class Published:
    """A data set that `hpcfl data get` knows: how to read it from a folder, how to download it into one, where it comes from, its terms."""

    read: Callable[[Path], Labelled]
    download: Callable[[Path], None]
    origin: str
    licence: str


def read_folder(path: Path) -> Labelled:
    """Image files in path/train/CLASS/ and path/test/CLASS/ (or val/); `path` is a folder or a .zip, classes are numbered in order of their names.

    One channel where every image is grey, else RGB. Names that begin with a dot are no data, at any depth; whatever else is left out is noted.

    Raises: DataError naming the file that is damaged, of another size, or of a class that has no training images.
    """
    with _opening_files(path) as files:
        test = "test" if any(name.startswith("test/") for name in files.names) else "val"
        return _decode_all(files, files.list_by_class("train"), files.list_by_class(test), _find_left_out(files, test))


def read_tiny_imagenet(path: Path) -> Labelled:
    """Tiny-ImageNet in its official layout, a folder or the .zip; the labelled val split is the test set (the official test images have no labels).

    Raises: DataError naming the file that is missing or damaged.
    """
    archive = path / "tiny-imagenet-200.zip"
    with _opening_files(archive if archive.is_file() else path) as files:
        annotations = "val/val_annotations.txt"
        if annotations not in files.names:
            raise DataError(f"{path}: has no {annotations}; wanted the official layout of tiny-imagenet-200 (train/, val/)")
        rows = [line.split("\t") for line in files.read(annotations).decode("utf-8", "replace").splitlines() if line]
        if any(len(row) < 2 for row in rows):
            raise DataError(f"{path}: {annotations} is damaged: every line should hold a file name and a class, separated by a tab")
        return _decode_all(files, files.list_by_class("train"), [(f"val/images/{row[0]}", row[1]) for row in rows])


def _find_left_out(files: "_Files", test: str) -> tuple[str, ...]:
    """What of a folder is not read, and which folders look like a class but hold no image, a clause each."""
    read = {name for split in ("train", test) for name, _ in files.list_by_class(split)}
    held = {name.rpartition("/")[0] for name in read}
    empty = sorted(folder for folder in files.folders if folder.count("/") == 1 and folder.split("/")[0] in ("train", test)
                   and not any(f"{below}/".startswith(f"{folder}/") for below in held))
    rest = sorted(files.names - read)
    notes = [f"{folder}/ holds no {', '.join(IMAGE_SUFFIXES)} file and is left out (a link to a folder is not followed)" for folder in empty]
    notes += [f"{count_text(len(rest), 'file')} left out, in no folder of a class or of no kind that is read: {list_text(rest)}"] if rest else []
    return tuple(notes)


def _decode_all(files: "_Files", train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]], notes: tuple[str, ...] = ()) -> Labelled:
    """Labelled from lists of (file name, class name)."""
    for folder, samples in (("train/", train), ("test/ or val/", test)):
        if not samples:
            raise DataError(f"{files.where}: no images in {folder}; wanted {folder.split()[0]}CLASS/*.png or *.jpg")
    number = {name: index for index, name in enumerate(sorted({name for _, name in train}))}
    for file, name in test:
        if name not in number:
            raise DataError(f"{files.where}: {file} is of class '{name}', which has no training images")
    first = _decode(files, train[0][0])[0].shape[1:]               # (H, W)
    (train_images, train_modes), (test_images, test_modes) = _stack(files, train, first), _stack(files, test, first)
    modes = train_modes | test_modes
    channels = 1 if modes <= set(GREY_MODES) else 3                # a grey image has three equal channels
    if changed := sorted(modes - {"RGB"}) if channels == 3 else []:
        notes = (*notes, f"images of Pillow's kinds {', '.join(changed)} became RGB, without transparency where they had any")
    labels = [np.array([number[name] for _, name in samples], dtype=np.int64) for samples in (train, test)]
    return build_labelled(str(files.where), train_images[:, :channels], labels[0], test_images[:, :channels], labels[1], tuple(number), notes)


def _stack(files: "_Files", samples: Sequence[tuple[str, str]], size: tuple[int, int]) -> tuple[np.ndarray, set[str]]:
    """Images of one size, (N, 3, H, W), and Pillow's names for the kinds of pixels that they had."""
    images, modes = np.empty((len(samples), 3, *size), dtype=np.uint8), set()
    for row, (name, _) in enumerate(samples):
        pixels, mode = _decode(files, name)
        if pixels.shape[1:] != size:
            raise DataError(f"{files.where}: {name} is {pixels.shape[1]} x {pixels.shape[2]} pixels, the first image is {size[0]} x {size[1]} "
                            "(height x width); all images of a data set must share one size: crop or resize them first")
        images[row] = pixels
        modes.add(mode)
    return images, modes


def _decode(files: "_Files", name: str) -> tuple[np.ndarray, str]:
    """One image as RGB, (3, H, W) uint8, and Pillow's name for the kind of pixels that it had."""
    from PIL import Image
    try:
        with Image.open(io.BytesIO(files.read(name))) as image:
            if image.mode not in GREY_MODES + COLOUR_MODES:
                raise DataError(f"{files.where}: {name} has pixels of kind '{image.mode}'; wanted 8-bit grey or colour")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1), image.mode
    except (*DAMAGED, KeyError, Image.DecompressionBombError) as error:
        raise DataError(f"{files.where}: {name} cannot be read as an image ({cause_text(error)}); it is missing, truncated or damaged") from error


@dataclass(frozen=True, eq=False)
class _Files:
    """What lies below the folder that holds train/, in a folder or a .zip: names relative to it, but for hidden ones, and how to read a file."""

    where: Path
    names: frozenset[str]
    folders: frozenset[str]
    read: Callable[[str], bytes]

    def list_by_class(self, split: str) -> list[tuple[str, str]]:
        """The image files SPLIT/CLASS/... with their CLASS, in order of class and name."""
        found = [name for name in self.names if name.startswith(f"{split}/") and name.count("/") >= 2 and name.lower().endswith(IMAGE_SUFFIXES)]
        return sorted(((name, name.split("/")[1]) for name in found), key=lambda sample: (sample[1], sample[0]))


@contextmanager
def _opening_files(path: Path) -> Iterator[_Files]:
    if path.is_dir():
        found = [(entry.relative_to(path).as_posix(), entry.is_dir()) for entry in path.rglob("*")]
        root, names, folders = _find_below_train(path, (f"{name}/" if is_folder else name for name, is_folder in found))
        yield _Files(path, names, folders, lambda name: (path / root / name).read_bytes())
        return
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED as error:
        raise DataError(f"{path}: is neither a folder nor a readable .zip ({cause_text(error)})") from error
    with archive:
        root, names, folders = _find_below_train(path, archive.namelist())
        yield _Files(path, names, folders, lambda name: archive.read(root + name))


def _find_below_train(where: Path, entries: Iterable[str]) -> tuple[str, frozenset[str], frozenset[str]]:
    """The prefix before the outermost train/ and the files and folders (entries that end in /) behind it: archives often hold one folder around everything."""
    entries = [entry for entry in entries if not any(part.startswith(".") or part in HIDDEN for part in entry.split("/"))]
    roots = [f"/{entry}".partition("/train/")[0] for entry in entries if "/train/" in f"/{entry}"]
    if not roots:
        raise DataError(f"{where}: holds no folder train/; wanted train/CLASS/*.png and test/CLASS/*.png (or val/)")
    root = min(roots, key=len).removeprefix("/")
    root = f"{root}/" if root else ""
    below = [entry.removeprefix(root) for entry in entries if entry.startswith(root)]
    return root, frozenset(entry for entry in below if not entry.endswith("/")), frozenset(entry.removesuffix("/") for entry in below if entry.endswith("/"))


def _read_idx_set(kind: str, path: Path) -> Labelled:
    """MNIST and its relatives from torchvision's folder, KIND/raw/*-ubyte[.gz]; packed files must have the official MD5 sums."""
    from torchvision import datasets
    official = {name.removesuffix(".gz"): md5 for name, md5 in getattr(datasets, kind).resources}
    arrays = {name: _read_idx(_find_idx(path, kind, name), md5) for name, md5 in official.items()}
    images = {split: arrays[f"{split}-images-idx3-ubyte"][:, None] for split in ("train", "t10k")}      # (N, 1, H, W)
    labels = {split: arrays[f"{split}-labels-idx1-ubyte"].astype(np.int64) for split in ("train", "t10k")}
    return build_labelled(f"{path} ({kind})", images["train"], labels["train"], images["t10k"], labels["t10k"])


def _find_idx(path: Path, kind: str, name: str) -> Path:
    places = [path / below / f"{name}{suffix}" for below in (f"{kind}/raw", "raw", ".") for suffix in (".gz", "")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataError(f"{path}: has no {kind}/raw/{name}.gz; --from wants the folder that torchvision calls root")
    return found


def _read_idx(path: Path, md5: str) -> np.ndarray:
    """An IDX file of bytes: two zeros, type 8, number of axes, their lengths as big-endian int32, then the bytes."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            got = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if got != md5:
                raise DataError(f"{path}: its MD5 sum is {got}, the official file has {md5}; it is truncated, damaged or another file: get it again")
            content = gzip.decompress(content)
        axes = content[3] if content[:3] == b"\0\0\x08" else 0
        shape = struct.unpack(f">{axes}i", content[4:4 + 4 * axes])
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (*DAMAGED, IndexError) as error:
        raise DataError(f"{path}: cannot be read as an IDX file ({cause_text(error)}); it is truncated or damaged") from error


def _read_torchvision(kind: str, train: dict, test: dict, path: Path) -> Labelled:
    """CIFAR and SVHN from torchvision's folder; torchvision opens a file only after checking its official MD5 sum."""
    from torchvision import datasets
    try:
        splits = [getattr(datasets, kind)(path, download=False, **which) for which in (train, test)]
    except DAMAGED as error:
        raise DataError(f"{path}: {kind} is not there or not whole ({cause_text(error)}); --from wants the folder that torchvision calls root, "
                        "with the unpacked official files") from error
    images = [split.data if split.data.shape[1] == 3 else split.data.transpose(0, 3, 1, 2) for split in splits]
    labels = [np.asarray(split.labels if hasattr(split, "labels") else split.targets, dtype=np.int64) for split in splits]
    return build_labelled(f"{path} ({kind})", images[0], labels[0], images[1], labels[1], tuple(getattr(splits[0], "classes", ())))


def _download_torchvision(kind: str, wanted: Sequence[dict], folder: Path) -> None:
    from torchvision import datasets
    for which in wanted:
        getattr(datasets, kind)(folder, download=True, **which)


def _download_tiny_imagenet(folder: Path) -> None:
    from torchvision.datasets.utils import download_url
    download_url(f"{TINY_IMAGENET}/tiny-imagenet-200.zip", folder, md5="90528d7ca1a48142e341f4ef8d21d0de")


def build_labelled(where: str, train_images: np.ndarray, train_labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray,
                   names: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> Labelled:
    """The data set with its classes numbered; `names`: of classes that are numbered already, else their labels."""
    for split, images, labels in (("training", train_images, train_labels), ("test", test_images, test_labels)):
        if len(images) != len(labels) or len(images) == 0:
            raise DataError(f"{where}: {len(images)} {split} images and {len(labels)} {split} labels; wanted equally many, at least one")
        if images.shape[1:] != train_images.shape[1:] or 0 in images.shape:
            raise DataError(f"{where}: {split} images are {images.shape[1:]}, training images {train_images.shape[1:]}; wanted one size, not empty")
    train_labels, test_labels, found, renumbered = classes.number_labels(where, train_labels, test_labels)
    brightest = max(train_images.max(), test_images.max())
    dark = [f"no value is above {brightest} of 255: the images are nearly black; save them as 0 to 255, or as floats in [0, 1]"] if brightest < 2 else []
    return Labelled(np.ascontiguousarray(train_images), train_labels, np.ascontiguousarray(test_images), test_labels, len(found),
                    names if len(names) == len(found) else found, (*notes, *renumbered, *dark))


_BOTH = ({"train": True}, {"train": False})
_SVHN = ({"split": "train"}, {"split": "test"})
TINY_IMAGENET = "http://cs231n.stanford.edu"
PUBLISHED = {
    "mnist": Published(partial(_read_idx_set, "MNIST"), partial(_download_torchvision, "MNIST", _BOTH[:1]),
                       "http://yann.lecun.com/exdb/mnist", "CC BY-SA 3.0, as commonly given"),
    "fashion_mnist": Published(partial(_read_idx_set, "FashionMNIST"), partial(_download_torchvision, "FashionMNIST", _BOTH[:1]),
                               "https://github.com/zalandoresearch/fashion-mnist", "MIT"),
    "svhn": Published(partial(_read_torchvision, "SVHN", *_SVHN), partial(_download_torchvision, "SVHN", _SVHN),
                      "http://ufldl.stanford.edu/housenumbers", "for non-commercial use"),
    "cifar10": Published(partial(_read_torchvision, "CIFAR10", *_BOTH), partial(_download_torchvision, "CIFAR10", _BOTH[:1]),
                         "https://www.cs.toronto.edu/~kriz/cifar.html", "none stated; cite Krizhevsky 2009"),
    "cifar100": Published(partial(_read_torchvision, "CIFAR100", *_BOTH), partial(_download_torchvision, "CIFAR100", _BOTH[:1]),
                          "https://www.cs.toronto.edu/~kriz/cifar.html", "none stated; cite Krizhevsky 2009"),
    "tiny_imagenet": Published(read_tiny_imagenet, _download_tiny_imagenet,
                               f"{TINY_IMAGENET}/tiny-imagenet-200.zip", "ImageNet's terms: non-commercial research and education"),
}
