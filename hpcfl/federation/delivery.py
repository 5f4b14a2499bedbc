"""Delivery: what the clients of each architecture download of the server's message, moved to the ranks that host them and to no others."""
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

DERIVED = "*"                                                      # begins the keys and parts of what is read, but is no tensor of the server's state


@dataclass(frozen=True)
class Download:
    """What a reader takes of a message: under which key ranks hold each leaf, and of each part the version and the bytes.

    Leaves that are the server's very tensors have its paths as keys and the versions of its parts. The keys of all others are the number of their bits, and
    together they are one part whose version follows from these: what was made anew and says the same is no news.
    """

    keys: Mapping[str, str]                                        # path -> key
    parts: Mapping[str, tuple[int, int]]                           # part -> (version, bytes)

    def version(self, key: str) -> int:
        """Of what a key stands for; what is called by its bits has but one."""
        return 0 if key.startswith(DERIVED) else self.parts[tree.root(key)][0]


@dataclass
class Message:
    """What a step has published of one version of the server's state, as far as somebody has asked for it."""

    version: int                                                   # of the server's state
    whole: Tree                                                    # at the server, empty elsewhere
    downloads: dict[str, Download] = field(default_factory=dict)   # by architecture
    trees: dict[str, Tree] = field(default_factory=dict)           # the same, at the server
    ranks: dict[str, set[int]] = field(default_factory=dict)       # where it has arrived, by architecture


@dataclass
class Delivery:
    """The messages of all steps, and of their leaves those that this rank needs.

    All ranks call every method alike. They all know who reads; what is read is for the server to find out, which alone runs `publish`, `receive` and
    `global_models`, and moves leaves to the ranks that need them and do not have them.
    """

    comm: Communicator
    home: Sequence[int]                                            # the rank of each client
    messages: dict[Algorithm, Message] = field(default_factory=dict, init=False)
    held: dict[str, Tensor] = field(default_factory=dict, init=False)                         # by key, at this rank
    places: dict[str, tuple[int, set[int]]] = field(default_factory=dict, init=False)         # key -> (version, ranks that hold it), at the server

    def publish(self, step: Algorithm, state: State, readers: Mapping[str, Collection[int]]) -> Message:
        """The message of a step, its downloads at the ranks that host the readers; readers: architecture -> clients."""
        message, told = self._find_current(step, state), {}
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
                told[architecture] = self._describe(message.trees[architecture], state)
        message.downloads |= self.comm.share(told)
        self._move({architecture: (ranks, len(readers[architecture])) for architecture, ranks in wanted.items()}, message.downloads, message.trees)
        for architecture, ranks in wanted.items():
            message.ranks.setdefault(architecture, set()).update(ranks)
        self._keep(lambda key: not key.startswith(DERIVED))
        return message

    def download(self, message: Message, architecture: str) -> Tree:
        """What clients of an architecture download of a message, at a rank that hosts some of its readers."""
        return self._take(message.downloads[architecture])

    def global_models(self, step: Algorithm, state: State) -> dict[str, tuple[str, Tree, int, int]]:
        """The federation's own models as a step has them: name -> (architecture, model, number of this rank among those who work with it, their number).

        Who holds a model works with it; one that nobody holds whole is moved to all ranks. A rank that has no part in a model does not get its name.
        """
        message, told = self._find_current(step, state), {}
        models: Mapping[str, tuple[str, Tree]] = {}
        if self.comm.is_server:
            with blame(step, "global_models"):
                models = require_models(verb_text(step, "global_models"), step.global_models(message.whole))
            downloads = {name: self._describe(model, state) for name, (_, model) in models.items()}
            told = {name: (models[name][0], download, self._find_holders(download)) for name, download in downloads.items()}
        told = self.comm.share(told)
        self._move({name: (set(ranks), len(self.home)) for name, (_, _, ranks) in told.items()}, {name: download for name, (_, download, _) in told.items()},
                   {name: model for name, (_, model) in models.items()})
        return {name: (architecture, self._take(download), ranks.index(self.comm.rank), len(ranks))
                for name, (architecture, download, ranks) in told.items() if self.comm.rank in ranks}

    def forget(self, steps: Collection[Algorithm]) -> None:
        """Let go of what other steps have published."""
        if self.messages.keys() <= set(steps):
            return
        self.messages = {step: message for step, message in self.messages.items() if step in steps}
        self._keep(lambda key: False)

    def _keep(self, also: Callable[[str], bool]) -> None:
        """Let go of leaves that no message has any more, but for some keys; the same ones at the server and at those who hold them."""
        read = {key for message in self.messages.values() for download in message.downloads.values() for key in download.keys.values()}
        self.held = {key: leaf for key, leaf in self.held.items() if key in read or also(key)}
        self.places = {key: place for key, place in self.places.items() if key in read or also(key)}

    def _take(self, download: Download) -> Tree:
        return {path: self.held[key] for path, key in download.keys.items()}

    def _find_current(self, step: Algorithm, state: State) -> Message:
        """The message of this version of the server's state, so far without readers if it is new."""
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
        looked_at = set(map(id, server.values()))
        derived = {path: leaf for path, leaf in whole.items() if id(leaf) not in looked_at}
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
        """The ranks that hold all of it, or else all ranks; asked at the server."""
        holders = set(range(self.comm.size))
        for key in download.keys.values():
            version, ranks = self.places.get(key, (None, set()))
            holders &= ranks if version == download.version(key) else set()
        return tuple(sorted(holders or range(self.comm.size)))

    def _move(self, wanted: Mapping[str, tuple[set[int], int]], downloads: Mapping[str, Download], trees: Mapping[str, Tree]) -> None:
        """Bring to ranks what their readers read and they do not hold; wanted: reader -> (ranks, number of clients)."""
        parcels: dict[Audience, Tree] = {}
        if self.comm.is_server:
            needed: dict[str, tuple[int, Tensor, set[int], int]] = {}
            for reader, (ranks, clients) in wanted.items():
                for path, key in downloads[reader].keys.items():
                    _, _, others, more = needed.get(key, (0, None, set(), 0))
                    needed[key] = downloads[reader].version(key), trees[reader][path], others | ranks, more + clients
            for key, (version, leaf, ranks, clients) in needed.items():
                known, there = self.places.get(key, (None, set()))
                if known != version:                               # nobody has it yet; what comes later to others is the same message
                    there = set()
                    self.comm.carry("bcast", leaf.nbytes, clients)
                if away := ranks - there - {0}:
                    parcels.setdefault((0, *sorted(away)), {})[key] = leaf
                self.places[key], self.held[key] = (version, there | ranks), leaf
        self.held |= self.comm.distribute(parcels)
