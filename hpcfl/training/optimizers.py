"""Optimizer: an update rule as data; torch's fused kernels do the work, and its state lies in Trees."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from hpcfl.errors import JobError
from hpcfl.settings.sections import Training

Slots = dict[str, list[Tensor]]                                    # slot -> one tensor per parameter, in the parameters' order
EPSILON = 1e-8                                                     # of adam; Kingma and Ba, 2015
STEP = "step"                                                      # the slot that counts updates: a float32 scalar, whatever the parameter's shape


@dataclass(frozen=True)
class Optimizer:
    """An update rule and its settings; what is not named is off.

    `clip` bounds the gradient norm of one client over all that its Turn trains (0: no clipping), as torch.nn.utils.clip_grad_norm_ does.
    Raises: JobError for a name that is not in RULES.
    """

    name: str
    lr: float
    momentum: float = 0.0                                          # sgd
    betas: tuple[float, float] = (0.9, 0.999)                      # adam; Kingma and Ba, 2015
    weight_decay: float = 0.0                                      # coupled: added to the gradient, in both rules
    clip: float = 0.0
    rate_setting: str = field(default="", compare=False)           # for advice: the setting of the job that `lr` comes from, and its value,
    clip_setting: str = field(default="", compare=False)           # and that of `clip`, where there is one

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise JobError(f"optimizer = {self.name!r} is not known; there are {', '.join(sorted(RULES))}")

    @staticmethod
    def from_settings(training: Training, **changes: Any) -> Optimizer:
        """The Optimizer of a job's [training] section, with some settings changed."""
        settings = {"name": training.optimizer, "lr": training.lr, "momentum": training.momentum, "weight_decay": training.weight_decay,
                    "clip": training.clip, "rate_setting": f"training.lr = {training.lr:g}", "clip_setting": f"training.clip = {training.clip:g}"}
        return Optimizer(**{**settings, **changes})

    @property
    def advice(self) -> str:
        """What a user can do where training by this rule diverges."""
        lower = f"lower the learning rate ({self.rate_setting or f'{self.lr:g}'})"
        return lower + (f" or bound the gradient norm ({self.clip_setting}{'' if self.clip else ': not at all'})" if self.clip_setting else "")

    @property
    def slots(self) -> tuple[str, ...]:
        """What the rule remembers of each parameter."""
        return RULES[self.name][0](self)

    @property
    def elementwise(self) -> bool:
        """Whether the rule treats every number alike; then the stacked leaf of many clients is updated as one tensor."""
        return STEP not in self.slots

    def update_out(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], slots: Slots) -> None:
        """Update parameters and slots once, in place. The kernels read memory flat, so gradients are first laid out like their parameters."""
        if parameters:
            aligned = [_lay_out_like(parameter, gradient) for parameter, gradient in zip(parameters, gradients, strict=True)]
            RULES[self.name][1](self, list(parameters), aligned, slots)


def begin_slot(slot: str, parameter: Tensor, rows: int | None = None) -> Tensor:
    """A slot before the first update: zeros laid out like the parameter; for STEP a counter (), or (rows,) for a stacked parameter."""
    return parameter.new_zeros(() if rows is None else (rows,), dtype=torch.float32) if slot == STEP else torch.zeros_like(parameter)


def clip_gradients(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Gradients scaled so that their common norm is at most `limit`; new tensors, for autograd may give one tensor to two parameters."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)            # the guard of torch.nn.utils.clip_grad_norm_
    return [gradient * scale for gradient in gradients]


def _lay_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def _sgd(optimizer: Optimizer, parameters: list[Tensor], gradients: list[Tensor], slots: Slots) -> None:
    # A buffer of zeros gives at the first step what torch starts from: momentum * 0 + gradient.
    momenta: list[Tensor | None] = [*slots["momentum"]] if "momentum" in slots else [None] * len(parameters)
    sgd(parameters, gradients, momenta, fused=True, lr=optimizer.lr, momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay, dampening=0.0, nesterov=False, maximize=False)


def _adam(optimizer: Optimizer, parameters: list[Tensor], gradients: list[Tensor], slots: Slots) -> None:
    adam(parameters, gradients, slots["exp_avg"], slots["exp_avg_sq"], [], slots[STEP], fused=True, lr=optimizer.lr, beta1=optimizer.betas[0],
         beta2=optimizer.betas[1], weight_decay=optimizer.weight_decay, eps=EPSILON, amsgrad=False, maximize=False)


RULES: dict[str, tuple[Callable[[Optimizer], tuple[str, ...]], Callable[[Optimizer, list[Tensor], list[Tensor], Slots], None]]] = {
    "sgd": (lambda optimizer: ("momentum",) if optimizer.momentum else (), _sgd),
    "adam": (lambda optimizer: ("exp_avg", "exp_avg_sq", STEP), _adam),
}
