"""Verbs: whether the steps of a plan can do what they are written for, and whether what their verbs give is what is wanted of them."""
import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hpcfl import tree
from hpcfl.contract.step import Algorithm, Phase, Update
from hpcfl.errors import HpcflError, JobError, LayoutError
from hpcfl.training.group import OPTIMIZER, Group
from hpcfl.tree import Marks, Tree
from hpcfl.wire.uplink import Uplink
from hpcfl.wording import did_you_mean, leaf_text, nearest, numbers_text

VERBS = ("modules", "accept", "found", "join", "prepare", "publish", "global_models", "receive", "train", "aggregate", "refine", "draw", "seen")
WORKING = ("prepare", "train", "aggregate", "refine")              # what a round is made of: a step without any of them does nothing
CLOSE = 0.8                                                        # how much of a name must be a verb's to be taken for a slip: trian, agregate, recieve


def check_plan(method: str, plan: Any) -> None:
    """Refuse a plan whose steps would do nothing, or something else than they say.

    Raises: JobError naming method, phase, step and verb.
    """
    if not isinstance(plan, tuple) or not plan or not all(isinstance(phase, Phase) and phase.rounds >= 0 for phase in plan):
        raise JobError(f"{method}: its plan is {plan!r}, wanted a tuple of at least one Phase of 0 rounds or more")
    names = [phase.name for phase in plan]
    if len(set(names)) < len(names):
        raise JobError(f"{method}: its phases are {', '.join(names)}; wanted each name once, for random streams and rounds are known by it")
    for phase in plan:
        if not phase.steps:
            raise JobError(f"{method}: phase '{phase.name}' has no steps; wanted at least one")
        for step in phase.steps:
            if not isinstance(step, Algorithm):
                raise JobError(f"{method}: phase '{phase.name}' has {step!r} among its steps, wanted an instance of Algorithm")
            kind, where = type(step), f"{method}: {type(step).__name__} in phase '{phase.name}'"
            _check_verbs(where, kind)
            if not any(kind.overrides(verb) for verb in WORKING):
                raise JobError(f"{where} would do nothing: it has none of {', '.join(WORKING)}; wanted one at least")
            if "aggregate" in vars(kind) and not kind.overrides("train"):                # of its own: what it inherits may be meant for others
                raise JobError(f"{where} has aggregate and no train, so nothing would ever be sent to it; wanted both, or prepare for what the server does "
                               "alone")


def _check_verbs(where: str, kind: type[Algorithm]) -> None:
    own = {name for base in kind.__mro__ if issubclass(base, Algorithm) for name in vars(base)} - vars(Algorithm).keys()
    for name in sorted(own):
        meant = nearest(name, VERBS, CLOSE)
        if meant and callable(getattr(kind, name)) and not name.startswith(meant):
            raise JobError(f"{where} has '{name}', which nobody calls{did_you_mean(meant)} If it is meant as it is, give it a name less like a verb's")
    for verb in VERBS:
        given, wanted = (inspect.signature(getattr(each, verb)) for each in (kind, Algorithm))
        try:
            given.bind(*wanted.parameters)
        except TypeError:
            raise JobError(f"{where}: {verb}{given} cannot be called with ({', '.join(wanted.parameters)}); wanted {verb}{wanted}") from None


@contextmanager
def blame(step: Algorithm, verb: str, whose: str = "") -> Iterator[None]:
    """What goes wrong in the block is said to be the verb's: in the words of an error of ours, and as a note under the traceback of any other."""
    where = verb_text(step, verb, whose)
    try:
        yield
    except LayoutError as error:
        if str(error).startswith(f"{type(step).__name__}."):       # it says where already
            raise
        raise LayoutError(f"{where}: {error}") from error
    except HpcflError:                                             # it says what the user is to do
        raise
    except Exception as error:
        error.add_note(f"raised in {where}")
        raise


def verb_text(step: Algorithm, verb: str, whose: str = "") -> str:
    """A verb in errors: 'FedAvg.train, clients 0, 3'."""
    return f"{type(step).__name__}.{verb}{whose and ', '}{whose}"


def require_tree(where: str, found: Any) -> Tree:
    """A Tree that a verb gave. Raises LayoutError for anything else."""
    if not isinstance(found, dict):
        raise LayoutError(f"{where}: gave {_type_text(found)}, wanted a Tree, a dict from path to Tensor")
    for path, leaf in found.items():
        if not isinstance(path, str) or not isinstance(leaf, Tensor):
            raise LayoutError(f"{where}: gave {path!r}: {_type_text(leaf)} in its Tree, wanted a path and a Tensor")
    return found


def check_kept(where: str, before: Tree, after: Tree, free: str = "") -> None:
    """Refuse that a leaf changes its shape or type from one round to the next, but for paths that begin with `free`. Raises: LayoutError."""
    for path in before.keys() & after.keys():
        old, new = before[path], after[path]
        if (old.shape != new.shape or old.dtype != new.dtype) and not (free and path.startswith(free)):
            raise LayoutError(f"{where}: gave '{path}' as {leaf_text(new.shape, new.dtype)}, wanted {leaf_text(old.shape, old.dtype)} as before; "
                              + ("cast it, .to(dtype), before it is returned" if old.shape == new.shape else "a leaf keeps its shape for the whole run"))


def check_unwritten(where: str, before: Marks, now: Tree, what: str) -> None:
    """Refuse what was written in place into tensors that others read. Raises: LayoutError."""
    if written := tree.find_changed(before, now):
        raise LayoutError(f"{where}: changed '{min(written)}' of {what} in place, which others read; work on a copy, for example tree.clone(...)")


def require_models(where: str, found: Any) -> Mapping[str, tuple[str, Tree]]:
    """What `global_models` gave. Raises LayoutError for anything else than name -> (architecture, Tree)."""
    if not isinstance(found, Mapping) or not all(isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) for each in found.values()):
        raise LayoutError(f"{where}: gave {_type_text(found)}, wanted a dict from name to (architecture, Tree)")
    for name, (_, model) in found.items():
        require_tree(f"{where}, '{name}'", model)
    return found


def require_modules(where: str, found: Any) -> Mapping[str, nn.Module]:
    """What `modules` gave. Raises LayoutError for anything else than name -> Module."""
    if not isinstance(found, Mapping) or not all(isinstance(name, str) and isinstance(module, nn.Module) for name, module in found.items()):
        raise LayoutError(f"{where}: gave {_type_text(found)}, wanted a dict from name to torch.nn.Module")
    return found


def require_group(where: str, found: Any, before: Group) -> Group:
    """A Group that a verb gave for another. Raises LayoutError for anything else, and where clients, paths, shapes or types are not those of `before`."""
    if not isinstance(found, Group):
        raise LayoutError(f"{where}: gave {_type_text(found)}, wanted a Group")
    if (found.architecture, found.clients) != (before.architecture, before.clients):
        got, wanted = (f"{group.architecture}, {numbers_text(group.clients, 'client')}" for group in (found, before))
        raise LayoutError(f"{where}: gave a Group of {got}, wanted {wanted}")
    require_tree(where, found.state)
    check_kept(where, before.state, found.state, f"{OPTIMIZER}/")
    return found


def require_update(where: str, found: Any, before: Group, heard: bool) -> Update:
    """What a client's verb gave. `heard`: whether anybody waits for what it sends up.

    Raises: LayoutError for anything else than an Update with the same clients, statistics of these clients and one number per client for each metric.
    """
    if not isinstance(found, Update):
        raise LayoutError(f"{where}: gave {_type_text(found)}, wanted an Update(group, statistics, metrics)")
    require_group(where, found.group, before)
    if not isinstance(found.uplink, Uplink):
        raise LayoutError(f"{where}: sends up {_type_text(found.uplink)}, wanted an Uplink")
    if found.uplink.pieces and not heard:
        names = ", ".join(map(repr, sorted(found.uplink.pieces)))
        raise LayoutError(f"{where}: sends up {names}, but nobody takes it: only what train sends is aggregated, by a step that has "
                          "aggregate. Send it from train, give the step an aggregate, or send nothing")
    if foreign := found.uplink.simulated_bytes().keys() - set(before.clients):
        raise LayoutError(f"{where}: sends up for client {min(foreign)}, wanted its own clients alone")
    for name, values in found.metrics.items():
        if not isinstance(values, Tensor) or tuple(values.shape) != (len(before.clients),):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else _type_text(values)
            raise LayoutError(f"{where}: gave metric '{name}' as {got}, wanted a Tensor ({len(before.clients)},), one number for each client")
    return found


def require_results(where: str, found: Any, items: Collection[int]) -> dict[int, Tree]:
    """Results of spread work. Raises LayoutError for anything else than a Tree for each of the items."""
    if not isinstance(found, dict) or found.keys() != set(items):
        got = f"results for {sorted(found)}" if isinstance(found, dict) else _type_text(found)
        raise LayoutError(f"{where}: gave {got}, wanted a dict with a Tree for each of {sorted(items)}")
    return {key: require_tree(f"{where}, item {key}", each) for key, each in found.items()}


def _type_text(found: Any) -> str:
    """What something is, for people who expected something else."""
    if isinstance(found, tuple):
        return f"a tuple of {', '.join(type(each).__name__ for each in found) or 'nothing'}"
    return "None" if found is None else f"a {type(found).__name__}"
