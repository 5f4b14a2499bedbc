"""Mutual information: bits about labels and about images in what a global model and smaller ones made of it give out, by nearest neighbours."""
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.contract import Problem
from hpcfl.data.shards import Shard
from hpcfl.errors import JobError, NonFiniteError
from hpcfl.federation.exchange import Exchange
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.state import State, schedule
from hpcfl.federation.world import World
from hpcfl.resize import slices
from hpcfl.runs import revisit
from hpcfl.training import evaluate
from hpcfl.tree import Tree
from hpcfl.wording import align_rows, printable_text

NEIGHBOURS = 3                                                     # fewer: more noise; more: coarser, reads too low (the usual choice of the papers below)
OUTPUTS = {"logits": "forward", "features": "features"}            # what a model gives out -> the method that gives it
SAME = 1e-12                                                       # squared distances below this share of their mean are rounding, not distance
HEADINGS = ("model", "architecture", "parameters", "accuracy", "bits on labels", "bits on images")

Models = Mapping[str, tuple[str, Tree]]                            # name -> (architecture of the zoo, its state_dict)


def nearness(points: Tensor) -> Tensor:
    """[i, j] = how many of the points (N, ...) lie strictly nearer to i than j does, (N, N) int64, by Euclidean distance in float64.

    Ranks have no unit and no width to choose. They stay the same for points shifted, turned or scaled, and 784 pixels count like 10 logits.
    """
    x = points.flatten(1).double()
    x = x - x.mean(0)
    norms = x.square().sum(1)
    squared = norms[:, None] + norms - 2 * x @ x.T                 # (N, N)
    squared[squared <= SAME * squared.mean()] = 0                  # equal points are at distance 0, whatever the rounding
    squared.fill_diagonal_(0)
    return torch.searchsorted(squared.sort(dim=1).values, squared)


def sameness(labels: Tensor) -> Tensor:
    """What `nearness` is for labels (N,): 0 to the own class and N, further than every point, to any other."""
    return torch.where(labels[:, None] == labels, 0, len(labels))


def information(one: Tensor, other: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Mutual information {bits, error} of two variables, each given by its (N, N) `nearness` or `sameness` over the same N samples.

    With rho_i the `neighbours`-th smallest of max(one[i], other[i]), i itself not counted, and n_i, m_i how many samples, i counted, are below rho_i in each:
    I = mean over i of psi(k) + psi(N) - psi(n_i) - psi(m_i), the estimator of Kraskov, Stoegbauer and Grassberger (2004, equation 8), for labels that of
    Ross (2014). Where rho_i = 0, k_i samples coincide with i and the term is log(k_i N / (n_i m_i)): Gao, Kannan, Oh and Viswanath (2017), exact
    for discrete variables. Ranks in the place of distances are ours; they read about 0.1 bit high between dependent points. `error` is the standard error of
    the mean. Chance gives about 0, and may be below it; from N samples no estimate exceeds `ceiling`, which true values of many bits do.

    Raises: JobError where a class has too few samples to have that many neighbours.
    """
    count, apart = len(one), torch.maximum(one, other)
    reach = apart.kthvalue(min(neighbours + 1, count), dim=1, keepdim=True).values                     # rho (N, 1); the nearest of all is i itself
    if count <= neighbours or bool((reach == count).any()):
        raise JobError(f"mutual information: a class has fewer than {neighbours + 1} of the {count} images; take more images")
    together = reach[:, 0] == 0
    n, m = (torch.where(reach == 0, each == 0, each < reach).sum(1).double() for each in (one, other))
    k = (apart == 0).sum(1).double()
    alike = (k * count / (n * m)).log()
    around = _psi(neighbours) + _psi(count) - torch.digamma(n) - torch.digamma(m)
    terms = torch.where(together, alike, around) / math.log(2)     # (N,)
    return {"bits": float(terms.mean()), "error": float(terms.std() / math.sqrt(count))}


def ceiling(count: int, neighbours: int = NEIGHBOURS) -> float:
    """The bits that a variable of `count` different points shares with itself: the most that `information` can find between points."""
    return (_psi(count) - _psi(neighbours)) / math.log(2)


def entropy(labels: Tensor) -> float:
    """H(Y) of labels (N,) in bits: the most that anything can say about them."""
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return float(-(shares * shares.log2()).sum())


def compare(models: Models, build: Callable[[str], nn.Module], shard: Shard, output: str = "logits") -> list[dict[str, Any]]:
    """Each model as a row {model, architecture, parameters, accuracy, labels, images}: parameters that are not 0, accuracy in percent on the shard, and the
    `information` between what the model gives out on it ("logits" | "features") and the labels and images.

    `build(architecture)` gives the structure. Raises: NonFiniteError naming the model; JobError as `information` and for another output.
    """
    if output not in OUTPUTS:
        raise JobError(f"there is no output {output!r}; wanted one of {', '.join(OUTPUTS)}")
    labels, images, rows = sameness(shard.labels), nearness(shard.pixels()), []
    for name, (architecture, state) in models.items():
        module = build(architecture)
        said = {method: evaluate.apply_in_batches(evaluate.bind(module, state, method), shard) for method in {OUTPUTS[output], "forward"}}
        given, logits = said[OUTPUTS[output]], said["forward"]
        if not bool(torch.isfinite(given).all() and torch.isfinite(logits).all()):
            raise NonFiniteError(f"model '{name}' ({architecture}): its {output} are not finite; the run diverged, lower its learning rates")
        near = nearness(given)
        rows.append({"model": name, "architecture": architecture,
                     "parameters": sum(int(state[path].count_nonzero()) for path, _ in module.named_parameters()),
                     "accuracy": 100 * float((logits.argmax(1) == shard.labels).double().mean()),
                     "labels": information(labels, near), "images": information(images, near)})
    return rows


def prune(state: Tree, full: nn.Module, small: nn.Module) -> Tree:
    """The full-size state_dict with as many parameters left as `small` has: the largest by magnitude over all layers, the others 0 (Han et al. 2015).

    Biases and norms stay. Raises: JobError where these alone are more than `small` has.
    """
    paths = [path for path, parameter in full.named_parameters() if parameter.dim() > 1]
    weights = torch.cat([state[path].flatten() for path in paths])
    spared = sum(parameter.numel() for _, parameter in full.named_parameters()) - len(weights)
    kept = sum(parameter.numel() for parameter in small.parameters()) - spared
    if kept < 1:
        raise JobError(f"pruning: the model has {spared} biases and norms, which are not pruned, the smaller one {kept + spared} parameters; "
                       "use smaller numbers in models.sizes")
    keeps = torch.zeros_like(weights, dtype=torch.bool)
    keeps[weights.abs().topk(kept).indices] = True
    pieces = (weights * keeps).split([state[path].numel() for path in paths])
    return state | {path: piece.view_as(state[path]) for path, piece in zip(paths, pieces, strict=True)}


def find_contenders(server: Tree, problem: Problem) -> dict[str, tuple[str, Tree]]:
    """The global model W of a server's state, and for each smaller architecture of the run the models of its size made of W.

    "convolved": what the server's filters make of it, where there are filters (small/<architecture>); "pruned": as `prune`; "sliced": leading channels,
    which are as good as any drawn at random unless W was trained to be sliced, without what clients of heterofl and fedrolex do to their slices. Both have
    the running statistics of W. Of the smaller models only the convolved ones were fitted to data, by their filters.
    Raises: JobError where the server keeps no global model.
    """
    whole = tree.part(server, "global")
    if not whole:
        raise JobError(f"algorithm '{problem.job.algorithm_name}' keeps no global model of full size to compare smaller ones with; wanted a run of fedconv, "
                       "heterofl or fedrolex")
    base = problem.common_base()
    filtered: dict[str, tuple[str, Tree]] = {"full": (base, whole)}
    full = problem.structure(base)
    for architecture in (name for name in problem.sizes.every if name != base):
        small, convolved = problem.structure(architecture), tree.part(server, f"small/{architecture}")
        if convolved:
            filtered[f"convolved {architecture}"] = architecture, convolved
        filtered[f"pruned to {architecture}"] = base, prune(whole, full, small)
        filtered[f"sliced {architecture}"] = architecture, slices.take(whole, slices.find_axes(full, small))
    return filtered


def open_round(world: World, state: State) -> State:
    """The state as clients meet it in the next round: the server has prepared it (fedconv trains W, tunes its filters and compresses W)."""
    places = schedule(world)
    place = places[state.rows] if state.rows < len(places) else replace(places[-1], round=places[-1].round + 1, row=state.rows)
    exchange = Exchange(world, Ledger(world.problem.device), lambda *_: None)
    step = place.phase.steps[0]
    return exchange.serve(step, "prepare", state, place)


def analyse(run: str | Path, images: int = 2000, output: str = "logits") -> dict[str, Any]:
    """How much the models made of a run's latest global model say about up to `images` of the official test images, drawn by the run's seed.

    The models are those that the next round would begin with, see `open_round`; the run itself is left as it is.
    {run, rounds, images, output, label_bits: H(Y), ceiling_bits, models: rows of `compare`}, with nothing in it that JSON cannot carry. Memory grows with the
    square of the images: 2000 take some 300 MB.
    Raises: as `revisit`; JobError as `find_contenders` and `compare`.
    """
    if images < 1:
        raise JobError(f"information: got {images} images, wanted at least 1, and some {100 * NEIGHBOURS} for figures that mean something")
    world, state = revisit.revisit(run)
    problem, test = world.problem, world.test
    chosen = torch.from_numpy(problem.stream("information").numpy().permutation(len(test))[:images]).to(test.labels.device)
    shard = Shard(test.images[chosen], test.labels[chosen], test.scale)
    models = find_contenders(tree.to(open_round(world, state).at_server(), problem.device), problem)
    return {"run": str(Path(run)), "rounds": state.rows, "images": len(shard), "output": output, "label_bits": entropy(shard.labels),
            "ceiling_bits": ceiling(len(shard)), "models": compare(models, problem.structure, shard, output)}


def render(found: Mapping[str, Any]) -> str:
    """What `analyse` found as a table for the terminal, bits with their standard errors."""
    head = (f"{printable_text(found['run'])}: {found['output']} on {found['images']} test images after {found['rounds']} rounds; "
            f"labels have {found['label_bits']:.2f} bits, of images at most {found['ceiling_bits']:.2f} can be seen")
    rows = [(row["model"], row["architecture"], f"{row['parameters']:,}", f"{row['accuracy']:.1f}",
             *(f"{row[kind]['bits']:.2f} ± {row[kind]['error']:.2f}" for kind in ("labels", "images"))) for row in found["models"]]
    return f"{head}\n{align_rows([HEADINGS, *rows], words=2)}"


def _psi(count: int) -> float:
    return float(torch.digamma(torch.tensor(float(count), dtype=torch.float64)))
