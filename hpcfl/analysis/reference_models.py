"""Reference models: what the [training] section makes of images that an audited model never saw, to calibrate membership attacks with."""
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hpcfl import tree
from hpcfl.contract import Problem
from hpcfl.data import shards
from hpcfl.data.shards import Shard
from hpcfl.errors import JobError
from hpcfl.training import evaluate
from hpcfl.training.group import Group
from hpcfl.training.losses import cross_entropy
from hpcfl.training.turns import Turn
from hpcfl.tree import Tree

SMALLEST = 2                                                       # images to train on: BatchNorm has no variance of one


def train_references(problem: Problem, architecture: str, pool: Shard, size: int, epochs: int, count: int,
                     purpose: str = "references") -> list[Callable[[Tensor], Tensor]]:
    """`count` models of an architecture, images -> logits, each trained from scratch for `epochs` passes over `size` images of its own draw from the pool.

    The pool is to hold neither members nor the images they are compared with. A draw is without replacement, draws of two models may overlap.
    Optimiser, batch and engine are the job's. `purpose` names the streams that model number i draws its images, weights and batches from: the same
    name and number gives the same model, however many there are. Watson et al., ICLR 2022, arXiv 2111.08440.
    Raises: JobError for a size that the pool does not have, and for less than one epoch or model; NonFiniteError naming the model that diverged.
    """
    if not SMALLEST <= size <= len(pool):
        raise JobError(f"reference models: got size {size}, wanted {SMALLEST} to {len(pool)}, the images of the pool; take smaller ones or a larger pool")
    if epochs < 1 or count < 1:
        raise JobError(f"reference models: got {count} models of {epochs} epochs, wanted at least 1 of each")
    pool, training, name = pool.to(problem.device), problem.job.training, f"{purpose}/{architecture}"
    augmentation = problem.augmentation(soft_labels=True)

    def initial(model: int) -> Tree:
        with problem.stream(f"{name}/init", model).seeding():
            return problem.model(architecture).state_dict()

    def batches(model: int) -> Iterable[Tree]:
        order = problem.stream(f"{name}/images", model).numpy().permutation(len(pool))
        chosen = torch.from_numpy(order[:size]).to(problem.device)
        drawn = Shard(pool.images[chosen], pool.labels[chosen], pool.scale)
        return shards.iterate_epochs(drawn, training.batch, epochs, problem.stream(f"{name}/batches", model), augmentation)
    group = Group(architecture, tuple(range(count)), tree.join(model=tree.stack([initial(model) for model in range(count)]))).to(problem.device)
    modules = {"model": problem.structure(architecture)}
    group, _ = problem.fit(group, modules, [Turn(("model",), cross_entropy, problem.optimizer())], batches,
                           steps=epochs * len(shards.list_batch_sizes(size, training.batch)), where="reference models", member="model")
    return [evaluate.bind_model(group, modules, model) for model in group.clients]
