"""What the tests of data sets share: small data sets as arrays, .npz files, folders of pictures and IDX files, and a pickle that must not be run."""
import struct
import zipfile
from io import BytesIO

import numpy as np
from PIL import Image

from hpcfl.data import corpora

COUNT, SHAPE = 400, (3, 16, 16)                                    # 42 images in a chunk, so ten chunks


def draw_arrays(count=30, shape=(3, 6, 5), seed=0):
    """What an .npz file holds: random images of three classes in turn."""
    generator = np.random.default_rng(seed)
    return {"x_train": generator.integers(0, 256, (count, *shape), dtype=np.uint8), "y_train": np.arange(count) % 3,
            "x_test": generator.integers(0, 256, (6, *shape), dtype=np.uint8), "y_test": np.arange(6) % 3}


def write_npz(folder, **changes):
    """An .npz file with some arrays changed; None leaves one out."""
    file = folder / "own.npz"
    np.savez(file, **{name: array for name, array in (draw_arrays() | changes).items() if array is not None})
    return file


def list_left(cache):
    """What a user would find in the cache: locks and stamps aside, the files and their sizes."""
    return {file.name: file.stat().st_size for file in cache.glob("*") if not file.name.endswith((".lock", ".verified"))} if cache.exists() else {}


def encode_picture(size=(5, 6), mode="RGB", kind="PNG", seed=0):
    """The bytes of an image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_folder(base, files):
    """Files by their paths below a folder, which is returned."""
    for name, content in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    return base


def draw_pictures():
    """A folder of pictures of two classes, as {path: bytes}."""
    train = {f"train/{name}/{index}.png": encode_picture(seed=10 * row + index) for row, name in enumerate(("cat", "dog")) for index in range(3)}
    return train | {"test/dog/a.png": encode_picture(seed=77), "test/cat/b.png": encode_picture(seed=78)}


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def pack_idx(values):
    """An array in the format of MNIST's files."""
    return struct.pack(f">2xBB{values.ndim}i", 8, values.ndim, *values.shape) + values.tobytes()


def draw_content(seed=0):
    """As `draw_arrays`, of five classes and large enough for several chunks."""
    generator = np.random.default_rng(seed)
    return {"x_train": generator.integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8), "y_train": np.arange(COUNT) % 5,
            "x_test": generator.integers(0, 256, (50, *SHAPE), dtype=np.uint8), "y_test": np.arange(50) % 5}


def read_everything(name="own"):
    """All images and labels of a data set in the cache."""
    corpus = corpora.open_corpus(name)
    return corpus.train_images(), corpus.train_labels, corpus.test_images(), corpus.test_labels


def write_tiny_zip(base, seed=0):
    """Tiny-ImageNet's layout with two classes."""
    files = {f"train/{name}/images/{name}_{index}.JPEG": encode_picture((64, 64), kind="JPEG", seed=seed + index)
             for name in ("n02", "n01") for index in range(3)}
    files |= {f"val/images/val_{index}.JPEG": encode_picture((64, 64), "L", "JPEG", seed=index) for index in range(2)}
    files |= {"val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n",
              "wnids.txt": b"n01\nn02\n", "test/images/test_0.JPEG": b""}
    with zipfile.ZipFile(base / "tiny-imagenet-200.zip", "w") as packed:
        for name, content in files.items():
            packed.writestr(f"tiny-imagenet-200/{name}", content)
    return base / "tiny-imagenet-200.zip"
