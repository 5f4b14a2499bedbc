"""Derived: a classifier whose weights are computed from other weights, so that training it is learning on models (FedConv, arXiv 2502.20639)."""
import copy
from abc import abstractmethod
from types import MethodType

from torch import Tensor, nn
from torch.func import functional_call

from hpcfl.tree import Tree

BUFFER = "buffer"                                                  # prefix of the classifier's own buffers among those of a Derived


class Derived(nn.Module):
    """A classifier f(x; w(parameters)): it learns how its weights are computed; the weights that they are computed from need no gradient and stay as they are.

    Any loss of logits will do. In train mode norm layers use and update the classifier's running statistics as usual. The forward pass is a functional
    call: no module is ever patched.
    """

    def __init__(self, structure: nn.Module) -> None:
        """`structure`: the classifier; only its shapes count."""
        super().__init__()
        self.structure = (copy.deepcopy(structure),)               # in a tuple: its parameters are computed, and are none of this module's
        for layer in self.structure[0].modules():
            if isinstance(reset := getattr(layer, "reset_running_stats", None), MethodType):
                reset()
        for path, buffer in self.structure[0].named_buffers():
            self.register_buffer(f"{BUFFER}:{to_name(path)}", buffer.detach().clone())

    @abstractmethod
    def derive_parameters(self) -> Tree:
        """The classifier's parameters by their paths in its state_dict, differentiable."""

    def weights(self) -> Tree:
        """The classifier's state_dict: computed parameters, and buffers as they are."""
        return self.derive_parameters() | {path: self.get_buffer(f"{BUFFER}:{to_name(path)}") for path, _ in self.structure[0].named_buffers()}

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images: (B, C, H, W) -> (B, classes)."""
        structure = self.structure[0]
        if structure.training != self.training:
            structure.train(self.training)
        return functional_call(structure, self.weights(), (x,))

    def derive_buffers(self, source: Tree) -> Tree:
        """The classifier's buffers from a state_dict of another size: the leading part of floating ones; larger ones begin as in a new layer, counters at 0."""
        own = {}
        for path, buffer in self.structure[0].named_buffers():
            given = source.get(path)
            if given is None or not given.is_floating_point() or any(few > many for few, many in zip(buffer.shape, given.shape, strict=True)):
                given = buffer
            own[f"{BUFFER}:{to_name(path)}"] = given[tuple(map(slice, buffer.shape))].clone()
        return own


def to_name(path: str) -> str:
    """A path of a state_dict as a name that a module may give to one of its own tensors or modules."""
    return path.replace(".", ":")


def to_channels_last(weight: Tensor) -> Tensor:
    """A conv weight (m, m', kx, ky) with its kernel positions before its input channels, (m, kx, ky, m'); anything else as it is."""
    return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight


def from_channels_last(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A parameter of this shape from what `to_channels_last` gave, with any axes; a conv weight lies in memory channels last, for the fast kernels."""
    if len(shape) != 4:
        return flat.reshape(shape)
    return flat.contiguous().view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
