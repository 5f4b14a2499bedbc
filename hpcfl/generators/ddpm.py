"""FedDDPM and FedDDPM-F: GeFL's class-conditional diffusion model for images and for the maps of a common extractor (arXiv 2412.18460)."""
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hpcfl.errors import LayoutError
from hpcfl.generators.generative import Call, Loss, Rule, check_model, one_hot, planes
from hpcfl.models.classifier import Shape
from hpcfl.tree import Tree

FIRST, FINAL = 1e-4, 0.02    # beta at index 0 and at index T of the linear schedule
RESIDUAL = 1.414             # the residual block divides by it: the published code's sqrt(2)
GROUPS = 8                   # of the GroupNorms
SMALL_GROUPS = 4             # of the one that follows the mean pool, up to a side of SMALL
SMALL = 16                   # pixels
RANGES = ("unit", "symmetric", "features")


@dataclass(frozen=True)
class Ddpm:
    """A U-Net that predicts the noise eps of x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps (Ho et al., arXiv 2006.11239), t = 1 ... steps.

    abar_t = prod over s = 0 ... t of (1 - beta_s), beta linear over the indices 0 ... T: the published code's product begins at index 0.
    `guidance` w samples with (1 + w) eps(x, y) - w eps(x, nothing) (Ho and Salimans, arXiv 2207.12598); training does not depend on it.
    `ddim_steps` > 0 samples by DDIM (Song et al., arXiv 2010.02502) in so many steps, `eta` times its noise; GeFL samples ancestrally.
    Paper steps: 100 for MNIST, FMNIST and SVHN; for CIFAR-10 400 (images), 500 (features). Sides are multiples of 4; the network of 64x64
    images is that of 32x32 with twice the pool (ours: none is published).
    Raises: LayoutError for other sides, ranges, widths and steps.
    """

    shape: Shape
    classes: int = 10
    steps: int = 100                                               # T
    width: int = 128
    drop: float = 0.1                                              # share of classes that training hides
    guidance: float = 0.0                                          # w
    ddim_steps: int = 0                                            # 0: ancestral sampling
    eta: float = 0.0                                               # of DDIM; 0: no noise but the first
    value_range: str = "unit"                                      # or "symmetric", "features"
    decay: ClassVar[str] = "linear"
    channels_last: ClassVar[bool | None] = None

    def __post_init__(self) -> None:
        check_model(self, lambda side: side > 0 and side % 4 == 0, "a multiple of 4", RANGES, steps=1, width=GROUPS, guidance=0, eta=0)
        if self.width % GROUPS or not 0 <= self.drop <= 1 or not 0 <= self.ddim_steps <= self.steps:
            raise LayoutError(f"Ddpm: got width {self.width}, drop {self.drop}, ddim_steps {self.ddim_steps}; wanted a multiple of {GROUPS}, "
                              f"a share in [0, 1] and at most steps = {self.steps}")

    @property
    def calls(self) -> int:
        """One per step of sampling."""
        return self.ddim_steps or self.steps

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": UNet(self)}

    def noise(self, batch: Tree, generator: torch.Generator) -> Tree:
        """eps, t ~ U{1 ... T} with sqrt(abar_t) and sqrt(1 - abar_t), and which classes training shows."""
        x = batch["x"]
        place: dict[str, Any] = {"generator": generator, "device": x.device}
        t = torch.randint(1, self.steps + 1, (len(x),), **place)
        signal = kept_signal(self.steps, x.device)[t]              # (B,) float64: 1 - abar cancels at small t
        return {**batch, "eps": torch.randn(x.shape, dtype=x.dtype, **place), "t": t, "signal": signal.sqrt().to(x.dtype),
                "spread": (1 - signal).sqrt().to(x.dtype), "kept": torch.rand(len(x), **place) >= self.drop}

    def losses(self) -> tuple[tuple[tuple[str, ...], Loss], ...]:
        return ((("generator",), self.denoising),)

    def rules(self) -> tuple[Rule, ...]:
        return (Rule("adam", 1e-4),)                               # GeFL, specification section 3.5

    def data_loss(self) -> Loss:
        return self.denoising

    def denoising(self, modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
        """Mean squared error of eps(x_t, t / T, c); c is the one-hot class, or 0 where it is hidden (3.5). The published code has -onehot."""
        x_t = diffuse(batch["x"], batch["eps"], batch["signal"], batch["spread"])
        label = one_hot(batch["y"], self.classes, x_t) * batch["kept"].unsqueeze(1)
        predicted = modules.generator(x_t, batch["t"].to(x_t.dtype) / self.steps, label)
        return (predicted - batch["eps"]).square().mean(), {}

    def sample(self, call: Call, y: Tensor, generator: torch.Generator) -> Tensor:
        """x_0 from x_T ~ N(0, I), ancestrally in T steps or by DDIM in `ddim_steps`; one call of the network per step."""
        def normal() -> Tensor:
            return torch.randn(len(y), *self.shape, generator=generator, device=y.device)
        x, times = normal(), self.list_times()
        for t, s in zip(times, [*times[1:], 0], strict=True):
            eps = self.estimate_noise(call, x, t, y)
            mean, deviation = self.step_ddim(x, eps, t, s) if self.ddim_steps else self.step_ancestral(x, eps, t)
            x = mean + deviation * normal() if s > 0 and deviation > 0 else mean
        return x

    def list_times(self) -> list[int]:
        """The steps t that sampling visits, T first: all, or `ddim_steps` at even distances."""
        return [round(self.steps * number / self.calls) for number in range(self.calls, 0, -1)]

    def estimate_noise(self, call: Call, x: Tensor, t: int, y: Tensor) -> Tensor:
        """(1 + w) eps(x, y) - w eps(x, nothing): one call of the network, for w > 0 on the batch with classes and without."""
        label, time = one_hot(y, self.classes, x), x.new_full((len(x),), t / self.steps)
        if self.guidance == 0:
            return call(x, time, label)
        given, free = call(torch.cat([x, x]), torch.cat([time, time]), torch.cat([label, torch.zeros_like(label)])).chunk(2)
        return (1 + self.guidance) * given - self.guidance * free

    def step_ancestral(self, x: Tensor, eps: Tensor, t: int) -> tuple[Tensor, float]:
        """Mean and deviation of x_{t-1}: (x - beta_t / sqrt(1 - abar_t) eps) / sqrt(1 - beta_t), and sqrt(beta_t); nothing is clipped."""
        beta, signal = betas(self.steps)[t].item(), kept_signal(self.steps)[t].item()
        return (x - beta / math.sqrt(1 - signal) * eps) / math.sqrt(1 - beta), math.sqrt(beta)

    def step_ddim(self, x: Tensor, eps: Tensor, t: int, s: int) -> tuple[Tensor, float]:
        """Mean and deviation of x_s, s < t, by equations (12) and (16) of DDIM; x_0 is the data, so abar is 1 there."""
        before, after = kept_signal(self.steps)[t].item(), kept_signal(self.steps)[s].item() if s > 0 else 1.0
        deviation = self.eta * math.sqrt((1 - after) / (1 - before) * (1 - before / after))
        data = (x - math.sqrt(1 - before) * eps) / math.sqrt(before)                        # x_0, as eps has it
        return math.sqrt(after) * data + math.sqrt(max(0.0, 1 - after - deviation ** 2)) * eps, deviation


@functools.cache
def betas(steps: int) -> Tensor:
    """beta_t, (T + 1,) float64 on the host."""
    return torch.linspace(FIRST, FINAL, steps + 1, dtype=torch.float64, device="cpu")


@functools.cache
def kept_signal(steps: int, device: torch.device | str = "cpu") -> Tensor:
    """abar_t, (T + 1,) float64: the share of the data's variance that is left after t steps."""
    return (1 - betas(steps)).cumprod(0).to(device)


def diffuse(x: Tensor, eps: Tensor, signal: Tensor, deviation: Tensor) -> Tensor:
    """x_t = signal * x + deviation * eps with factors (B,)."""
    shape = (-1, *[1] * (x.dim() - 1))
    return signal.view(shape) * x + deviation.view(shape) * eps


class UNet(nn.Module):
    """Two levels of blocks down to 1/4 of the side, a mean over the rest of it, and two levels up that read time and class.

    The network of the public "Conditional_Diffusion_MNIST" model, as specification section 3.5 writes it down.
    """

    def __init__(self, kind: Ddpm) -> None:
        super().__init__()
        (channels, side, _), n = kind.shape, kind.width
        self.begin = Residual(channels, n)
        self.down1 = nn.Sequential(*build_block(n, n), nn.MaxPool2d(2))
        self.down2 = nn.Sequential(*build_block(n, 2 * n), nn.MaxPool2d(2))
        self.mean = nn.Sequential(nn.AvgPool2d(side // 4), nn.GELU())
        self.time1, self.time2 = build_embedding(1, 2 * n), build_embedding(1, n)
        self.class1, self.class2 = build_embedding(kind.classes, 2 * n), build_embedding(kind.classes, n)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(2 * n, 2 * n, side // 4, side // 4),
                                 nn.GroupNorm(SMALL_GROUPS if side <= SMALL else GROUPS, 2 * n), nn.ReLU())
        self.up1 = nn.Sequential(nn.ConvTranspose2d(4 * n, n, 2, 2), *build_block(n, n), *build_block(n, n))
        self.up2 = nn.Sequential(nn.ConvTranspose2d(2 * n, n, 2, 2), *build_block(n, n), *build_block(n, n))
        self.end = nn.Sequential(nn.Conv2d(2 * n, n, 3, padding=1), nn.GroupNorm(GROUPS, n), nn.ReLU(), nn.Conv2d(n, channels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """eps, like x (B, C, H, H), for times t / T (B,) and labels (B, classes), one-hot or zero."""
        time = time.unsqueeze(1)
        first = self.begin(x)                                      # (B, n, H, H)
        half = self.down1(first)                                   # (B, n, H/2, H/2)
        quarter = self.down2(half)                                 # (B, 2n, H/4, H/4)
        up = self.up0(self.mean(quarter))                          # (B, 2n, H/4, H/4)
        up = self.up1(torch.cat([modulate(up, self.class1(label), self.time1(time)), quarter], 1))
        up = self.up2(torch.cat([modulate(up, self.class2(label), self.time2(time)), half], 1))
        return self.end(torch.cat([up, first], 1))


class Residual(nn.Module):
    """Conv, conv, and the input added, or the first conv's output where the input has other channels."""

    def __init__(self, channels: int, wanted: int) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(*build_convolution(channels, wanted)), nn.Sequential(*build_convolution(wanted, wanted))
        self.same = channels == wanted

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, wanted, H, W)."""
        first = self.first(x)
        return ((x if self.same else first) + self.second(first)) / RESIDUAL


def build_convolution(channels: int, wanted: int) -> tuple[nn.Module, ...]:
    """Conv 3x3 - BatchNorm - GELU."""
    return nn.Conv2d(channels, wanted, 3, padding=1), nn.BatchNorm2d(wanted), nn.GELU()


def build_block(channels: int, wanted: int) -> tuple[nn.Module, ...]:
    """Two convolutions."""
    return *build_convolution(channels, wanted), *build_convolution(wanted, wanted)


def build_embedding(size: int, wanted: int) -> nn.Module:
    """Linear - GELU - linear."""
    return nn.Sequential(nn.Linear(size, wanted), nn.GELU(), nn.Linear(wanted, wanted))


def modulate(maps: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * maps + shift with factors (B, C) of maps (B, C, H, W)."""
    return planes(scale, maps) * maps + planes(shift, maps)
