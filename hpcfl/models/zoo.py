"""Zoo: the classifiers that a job can name, as data, and what each costs."""
import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hpcfl.errors import JobError
from hpcfl.models.classifier import Family, Model, Shape
from hpcfl.models.cnn import Cnn
from hpcfl.models.flops import Counter
from hpcfl.models.mlp import Mlp
from hpcfl.models.norms import NORMS
from hpcfl.models.resnet import ResNet
from hpcfl.models.torchvision_nets import GoogLeNet, MobileNetV2
from hpcfl.models.vit import Vit
from hpcfl.wording import did_you_mean, nearest

GEFL: dict[str, Cnn] = {                                       # GeFL, specification section 4
    "cnn1": Cnn((16,)),
    "cnn2": Cnn((16, 32)),
    "cnn3": Cnn((20, 40)),
    "cnn4": Cnn((10, 20)),
    "cnn5": Cnn((16, 32, 64)),
    "cnn6": Cnn((20, 40, 80)),
    "cnn7": Cnn((10, 20, 40)),
    "cnn8": Cnn((16, 32, 64, 128)),
    "cnn9": Cnn((20, 40, 80, 100)),
    "cnn10": Cnn((10, 20, 40, 80)),
}
ENTRIES: dict[str, Family] = {
    **GEFL,
    **{f"{name}_bn": replace(net, normed=True) for name, net in GEFL.items()},                        # FMNIST: norms in the header too
    **{f"{name}_svhn": replace(net, normed=True, extractor="svhn") for name, net in GEFL.items()},    # and one conv before it on colour
    "w1": Cnn((32, 64), extractor="none", kernel=5, padding=0, hidden=512),                           # the benchmark net of 878,538 parameters
    "fedconv": Cnn((16, 32), extractor="none"),                                                       # FedConv, specification section 6
    **{f"mlp{depth}": Mlp(depth) for depth in range(2, 7)},
    "resnet8": ResNet((1, 1, 1)),
    "resnet10": ResNet((1, 1, 1, 1)),
    "resnet18": ResNet((2, 2, 2, 2)),
    "resnet34": ResNet((3, 4, 6, 3)),
    "mobilenet_v2": MobileNetV2(),
    "googlenet": GoogLeNet(),
    "vit": Vit(),
}


def build(name: str, shape: Shape, classes: int, features: int = 64, norm: str = "batch", feature_relu: bool = True) -> Model:
    """A freshly initialised classifier (PyTorch's defaults, drawn from torch's global CPU generator: call it inside `Stream.seeding`).

    `name`: an entry of the zoo, "cnn5", or an entry and its width, "cnn5@0.75": a width in (0, 1] shrinks every hidden width c to int(c * width), but not
    p, images and classes (FedConv, HeteroFL). `shape` is that of one image (C, H, W); `features` the common feature size p, 0 for the model's own; `norm`
    "batch" or "group".
    Raises: JobError as `find_entry`, for an unknown norm, sizes that are not positive, images too small for the model, and a width that leaves some
    hidden layer no channel.
    """
    family, width = find_entry(name)
    if norm not in NORMS:
        raise JobError(f"models.norm = {norm!r} is not known; wanted one of {', '.join(NORMS)}")
    if len(shape) != 3 or min(shape) < 1 or classes < 1 or features < 0:
        raise JobError(f"model '{name}': got images {tuple(shape)}, {classes} classes, {features} features; wanted (C, H, W) and classes of "
                       "at least 1, features of at least 0")
    if min(shape[1:]) < family.find_smallest():
        raise JobError(f"models.names: '{name}' got images of {shape[1]}x{shape[2]} pixels, wanted at least {family.find_smallest()}x{family.find_smallest()}; "
                       "choose another model or enlarge the images by data.image_size")
    try:
        trunk = family.build_trunk((shape[0], shape[1], shape[2]), norm, width)
    except JobError as error:
        raise JobError(f"models.names: '{name}': {error}") from error
    return Model(trunk, shape, classes, features, feature_relu)


def find_entry(name: str) -> tuple[Family, float]:
    """The family behind a name and the width behind its @, 1 where there is none.

    Raises: JobError as `split_name`, and with the nearest name for one that does not exist.
    """
    base, width = split_name(name)
    if base not in ENTRIES:
        meant = nearest(base, ENTRIES)
        raise JobError(f"models.names: '{name}' is not in the zoo{did_you_mean(meant and meant + name.removeprefix(base))}; there are {', '.join(ENTRIES)}")
    return ENTRIES[base], width


def split_name(architecture: str) -> tuple[str, float]:
    """The name of the full-size model and the width behind the @, 1 where there is none: "cnn5@0.75" is ("cnn5", 0.75).

    Raises: JobError for a width that is no number above 0 and at most 1.
    """
    base, at, text = architecture.partition("@")
    if not at:
        return base, 1.0
    try:
        width = float(text)
    except ValueError:
        width = math.nan
    if not 0 < width <= 1:
        raise JobError(f"models.names: '{architecture}' has width '{text}', wanted a number above 0 and at most 1, for example {base}@0.75")
    return base, width


@cache
def count_flops(name: str, shape: Shape, classes: int, features: int = 64, norm: str = "batch", feature_relu: bool = True) -> int:
    """Floating-point operations of one forward pass of one image, as flops.Counter counts them. Arguments and errors as of `build`.

    A real image of zeros passes: torch's meta device would import its compiler, a second of every start.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = build(name, shape, classes, features, norm, feature_relu).eval()
        with Counter() as counter:
            model(torch.zeros(1, *shape))
    return counter.flops


@cache
def count_training_bytes(name: str, shape: Shape, classes: int, features: int, norm: str, feature_relu: bool, batch: int, slots: int) -> int:
    """Bytes that training one model takes: parameters, gradients, `slots` optimiser states of each parameter, buffers, and what is kept for the backward pass.

    Arguments and errors as of `build`; `batch` in images. The kept bytes are measured on the CPU in float32, for two and for three images (BatchNorm on 1x1
    maps refuses one alone), and continued along the straight line through both: a kept tensor has a row for each image, or none. Not counted:
    temporary memory inside a layer and gaps of the allocator.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model = build(name, shape, classes, features, norm, feature_relu)
        two, three = (count_kept_bytes(model, images) for images in (2, 3))
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return (2 + slots) * parameters + buffers + two + (three - two) * (batch - 2)


def count_kept_bytes(model: Model, images: int) -> int:
    """Bytes that a forward pass and its cross-entropy keep for the backward pass: each storage once, parameters and buffers not at all."""
    owned = {leaf.untyped_storage().data_ptr() for leaf in model.state_dict().values()}
    storages: dict[int, torch.UntypedStorage] = {}                 # held, so that no freed address is used again

    def keep(leaf: Tensor) -> Tensor:
        storage = leaf.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage
        return leaf
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda leaf: leaf):
        F.cross_entropy(model(torch.zeros(images, *model.shape)), torch.zeros(images, dtype=torch.int64))
    return sum(storage.nbytes() for storage in storages.values())
