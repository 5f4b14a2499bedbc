"""A small vision transformer: an image as at most 8x8 patches, read by self-attention whose four weights are layers of their own."""
from collections import OrderedDict
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from hpcfl.models.classifier import Shape, Trunk, scale_width

PATCHES = 8              # the most patches along one side: 64 tokens from 32x32 images on, so attention stays a small part of the work
SMALLEST_PATCH = 2       # pixels: 8x8 digits are 4x4 tokens
INITIAL_SCALE = 0.02     # standard deviation of the positions before training, as of the ViT's authors


class Patches(nn.Module):
    """The embedding of each patch, a linear map of its pixels written as a conv, plus a learned vector for each position (ViT, equation 1).

    An image that patches do not divide is padded with zeros at its borders. The positions are a table (T, D), a row for each token.
    """

    def __init__(self, shape: Shape, dim: int) -> None:
        super().__init__()
        patch = (max(SMALLEST_PATCH, -(-shape[1] // PATCHES)), max(SMALLEST_PATCH, -(-shape[2] // PATCHES)))
        padding = ((-shape[1] % patch[0] + 1) // 2, (-shape[2] % patch[1] + 1) // 2)
        self.conv = nn.Conv2d(shape[0], dim, patch, patch, padding)
        tokens = prod(-(-side // size) for side, size in zip(shape[1:], patch, strict=True))
        self.positions = nn.Parameter(torch.empty(tokens, dim))
        nn.init.normal_(self.positions, std=INITIAL_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D)."""
        return self.conv(x).flatten(2).transpose(1, 2) + self.positions


class Attention(nn.Module):
    """out(softmax(q k^T / sqrt(S)) v) in each of `heads` heads of size S (Vaswani et al. 2017, equation 1).

    q, k, v and out are linear layers of their own, for filters of weights work on one of them at a time; head h owns rows h S .. h S + S - 1 of
    q, k and v and those columns of out. Nothing is dropped, so that nothing is drawn. Written out, because torch's own kernel has no rule under vmap
    on CPU (its fallback is a loop that warns) and at most 64 tokens leave it little to save.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.v, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.k = nn.Linear(dim, dim, bias=False)                   # a bias would add the same to all scores of a query, which softmax takes away

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))     # (B, heads, T, S)
        weights = torch.softmax(q * q.shape[-1]**-0.5 @ k.transpose(2, 3), -1)                                         # (B, heads, T, T)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """y = x + attention(norm(x)), then y + mlp(norm(y)): the norms first, as in the ViT (equations 2 and 3)."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(linear1=nn.Linear(dim, hidden), gelu=nn.GELU(), linear2=nn.Linear(hidden, dim)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Average(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, D)."""
        return x.mean(1)


@dataclass(frozen=True)
class Vit:
    """Dosovitskiy et al. 2021 (ICLR), with sizes for images of 8 to 64 pixels (ours).

    The last norm is followed by a ReLU and the average over the tokens in the place of a class token: so the body ends as every other family's,
    in features that are not negative. A width shrinks the size of one head, never their number, hence D = heads * int(head * width).
    Norms are LayerNorm whatever models.norm says: it has no running statistics, and a transformer knows no other.
    """

    depth: int = 4
    heads: int = 4
    head: int = 16                           # values in one head: D = 64
    hidden: int = 128                        # of the two-layer network in each block

    def find_smallest(self) -> int:
        """1 pixel: a patch is padded."""
        return 1

    def build_trunk(self, shape: Shape, norm: str, width: float) -> Trunk:
        """No common extractor; the body ends in the average of its last tokens."""
        dim = self.heads * scale_width(self.head, width)
        layers = OrderedDict[str, nn.Module](patches=Patches(shape, dim))
        layers |= {f"block{index}": Block(dim, self.heads, scale_width(self.hidden, width)) for index in range(1, self.depth + 1)}
        layers |= {"norm": nn.LayerNorm(dim), "relu": nn.ReLU(), "average": Average()}
        return Trunk(nn.Sequential(), shape, nn.Sequential(layers), dim)
