"""Delivery: what clients download of the server's message, moved to the ranks that host these clients and to no others."""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hpcfl import tree
from hpcfl.contract import Algorithm
from hpcfl.contract.verbs import blame, check_kept, check_unwritten, require_models, require_tree, verb_text
from hpcfl.federation.finite import refuse_broken
from hpcfl.federation.state import State
from hpcfl.tree import Tree
from hpcfl.wire.communicator import Audience, Communicator

DERIVED = "*"                                                      # begins the keys and parts of leaves that are no tensor of the server's state


@dataclass(frozen=True)
class Download:
    """What clients of one architecture take of a message: the key under which ranks hold each leaf, and the version and bytes of each part.

    A leaf that is a tensor of the server's state has that tensor's path as its key; its part and version are those of the state. A derived leaf has a number
    of its bits as its key. All derived leaves together are one part, whose version follows from their keys: a derived leaf that is computed anew with the
    same bits is not downloaded again.
    """

    keys: Mapping[str, str]                                        # path -> key
    parts: Mapping[str, tuple[int, int]]                           # part -> (version, bytes)

    def version(self, key: str) -> int:
        """The version of the leaf behind a key; a key made of bits stands for one version only."""
        return 0 if key.startswith(DERIVED) else self.parts[tree.root(key)][0]


@dataclass
class Message:
    """What a step has published of one version of the server's state, and the downloads that somebody has asked for so far."""

    version: int                                                   # of the server's state
    whole: Tree                                                    # at the server, empty elsewhere
    downloads: dict[str, Download] = field(default_factory=dict)   # by architecture
    trees: dict[str, Tree] = field(default_factory=dict)           # the leaves of each download, at the server
    ranks: dict[str, set[int]] = field(default_factory=dict)       # where each download has arrived, by architecture


@dataclass
class Delivery:
    """The messages of all steps, and those of their leaves that this rank needs.

    All ranks call every method alike, and all know which clients read. What these read only the server knows: it alone calls a step's `publish`, `receive` and
    `global_models`, and sends leaves to the ranks that need them and do not hold them.
    """

    comm: Communicator
    home: Sequence[int]                                            # the rank of each client
    messages: dict[Algorithm, Message] = field(default_factory=dict, init=False)
    held: dict[str, Tensor] = field(default_factory=dict, init=False)                         # by key, at this rank
    places: dict[str, tuple[int, set[int]]] = field(default_factory=dict, init=False)         # key -> (version, ranks that hold it), at the server

    def publish(self, step: Algorithm, state: State, readers: Mapping[str, Collection[int]]) -> Message:
        """The message of a step, its downloads at the ranks that host the readers; readers: architecture -> clients."""
        message, found = self._find_current(step, state), {}
        wanted = {architecture: {self.home[client] for client in clients} for architecture, clients in readers.items()}
        if all(ranks <= message.ranks.get(architecture, set()) for architecture, ranks in wanted.items()):
            return message
        if self.comm.is_server:
            before = tree.marks(state.at_server())
            for architecture in wanted.keys() - message.trees.keys():
                where = verb_text(step, "receive", f"for {architecture}")
                with blame(step, "receive", f"for {architecture}"), step.problem.stream("receive", round_=state.version).seeding():
                    message.trees[architecture] = require_tree(where, step.receive(message.whole, architecture))
                check_unwritten(where, before, state.at_server(), "the server's state")
                found[architecture] = self._describe(message.trees[architecture], state)
        message.downloads |= self.comm.share(found)
        self._move({architecture: (ranks, len(readers[architecture])) for architecture, ranks in wanted.items()}, message.downloads, message.trees)
        for architecture, ranks in wanted.items():
            message.ranks.setdefault(architecture, set()).update(ranks)
        self._drop_unread(lambda key: not key.startswith(DERIVED))
        return message

    def download(self, message: Message, architecture: str) -> Tree:
        """What clients of an architecture download of a message; at a rank that hosts some of them."""
        return self._take(message.downloads[architecture])

    def global_models(self, step: Algorithm, state: State) -> dict[str, tuple[str, Tree, int, int]]:
        """The step's models of the whole federation: name -> (architecture, model, this rank's number among those that evaluate it, their number).

        The ranks that hold a model evaluate it; one that no rank holds whole is moved to all. A rank that evaluates no share of a model does not get its name.
        """
        message, found = self._find_current(step, state), {}
        models: Mapping[str, tuple[str, Tree]] = {}
        if self.comm.is_server:
            with blame(step, "global_models"):
                models = require_models(verb_text(step, "global_models"), step.global_models(message.whole))
            downloads = {name: self._describe(model, state) for name, (_, model) in models.items()}
            found = {name: (models[name][0], download, self._find_holders(download)) for name, download in downloads.items()}
        found = self.comm.share(found)
        self._move({name: (set(ranks), len(self.home)) for name, (_, _, ranks) in found.items()}, {name: download for name, (_, download, _) in found.items()},
                   {name: model for name, (_, model) in models.items()})
        return {name: (architecture, self._take(download), ranks.index(self.comm.rank), len(ranks))
                for name, (architecture, download, ranks) in found.items() if self.comm.rank in ranks}

    def forget(self, steps: Collection[Algorithm]) -> None:
        """Let go of what all other steps have published."""
        if self.messages.keys() <= set(steps):
            return
        self.messages = {step: message for step, message in self.messages.items() if step in steps}
        self._drop_unread(lambda key: False)

    def _drop_unread(self, keeps: Callable[[str], bool]) -> None:
        """Let go of leaves that no message has any more, unless `keeps(key)`; the server and the holders let go of the same leaves."""
        read = {key for message in self.messages.values() for download in message.downloads.values() for key in download.keys.values()}
        self.held = {key: leaf for key, leaf in self.held.items() if key in read or keeps(key)}
        self.places = {key: place for key, place in self.places.items() if key in read or keeps(key)}

    def _take(self, download: Download) -> Tree:
        return {path: self.held[key] for path, key in download.keys.items()}

    def _find_current(self, step: Algorithm, state: State) -> Message:
        """The message of this version of the server's state; a new one has no downloads yet."""
        message = self.messages.get(step)
        if message is None or message.version != state.version:
            whole = self._publish_anew(step, state, message.whole if message else {}) if self.comm.is_server else {}
            message = self.messages[step] = Message(state.version, whole)
        return message

    def _publish_anew(self, step: Algorithm, state: State, earlier: Tree) -> Tree:
        server, where = state.at_server(), verb_text(step, "publish")
        before = tree.marks(server)
        with blame(step, "publish"), step.problem.stream("publish", round_=state.version).seeding():
            whole = require_tree(where, step.publish(server))
        check_unwritten(where, before, server, "the server's state")
        check_kept(where, earlier, whole)
        checked = set(map(id, server.values()))              # when the server computed them
        derived = {path: leaf for path, leaf in whole.items() if id(leaf) not in checked}
        refuse_broken(derived, earlier, f"server, {where}", f"lower {step.problem.rates()}")
        return whole

    def _describe(self, read: Tree, state: State) -> Download:
        owners = {id(leaf): path for path, leaf in state.at_server().items()}
        keys = {path: owners[id(leaf)] if id(leaf) in owners else f"{DERIVED}{tree.fingerprint({'': leaf})}" for path, leaf in read.items()}
        derived = sorted((path, key) for path, key in keys.items() if key.startswith(DERIVED))
        own = f"{DERIVED}{tree.number([path for path, _ in derived]):x}"
        sizes: dict[str, int] = {}
        for path, key in keys.items():
            part = own if key.startswith(DERIVED) else tree.root(key)
            sizes[part] = sizes.get(part, 0) + read[path].nbytes
        versions = state.versions | {own: tree.number(derived)}
        return Download(keys, {part: (versions.get(part, 0), size) for part, size in sizes.items()})

    def _find_holders(self, download: Download) -> Audience:
        """The ranks that hold all of a download, or all ranks if none does; at the server."""
        holders = set(range(self.comm.size))
        for key in download.keys.values():
            version, ranks = self.places.get(key, (None, set()))
            holders &= ranks if version == download.version(key) else set()
        return tuple(sorted(holders or range(self.comm.size)))

    def _move(self, wanted: Mapping[str, tuple[set[int], int]], downloads: Mapping[str, Download], trees: Mapping[str, Tree]) -> None:
        """Bring to ranks what their readers need and they do not hold; wanted: reader -> (ranks, number of clients)."""
        parcels: dict[Audience, Tree] = {}
        if self.comm.is_server:
            needed: dict[str, tuple[int, Tensor, set[int], int]] = {}
            for reader, (ranks, clients) in wanted.items():
                for path, key in downloads[reader].keys.items():
                    _, _, others, more = needed.get(key, (0, None, set(), 0))
                    needed[key] = downloads[reader].version(key), trees[reader][path], others | ranks, more + clients
            for key, (version, leaf, ranks, clients) in needed.items():
                held_version, there = self.places.get(key, (None, set()))
                if held_version != version:                        # nobody has it yet; ranks that get it later get the same message
                    there = set()
                    self.comm.traffic.carry("bcast", leaf.nbytes, clients)
                if away := ranks - there - {0}:
                    parcels.setdefault((0, *sorted(away)), {})[key] = leaf
                self.places[key], self.held[key] = (version, there | ranks), leaf
        self.held |= self.comm.distribute(parcels)
