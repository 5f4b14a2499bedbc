"""Sections: the settings of a job but those of its algorithm, each with its default, what it means, and what a job file may put there.

A setting whose values a table carries out says what the table is of; the table itself stands on a higher floor and comes with the call that reads a job.
"""
from dataclasses import dataclass

from hpcfl.settings.fields import choice, choice_of, flag, folder_name, integer, integers, name_of, names_of, real, reals, selection, text

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Run:
    """What the run is called, what its random numbers follow from, and what computes it."""

    name: str = folder_name("run", meaning="names the folder under runs/")
    seed: int = integer(0, 0, meaning="what every random number follows from")
    device: str = choice(*DEVICES, meaning="where networks are trained; auto: cuda where torch sees one")
    compile: str = choice_of("compiling", "auto", meaning="torch.compile; auto: on CUDA where the expected steps pay for the compilation")
    deterministic: bool = flag(False, meaning="bit-identical on any number of ranks (CPU), at a measured price")
    threads: int = integer(0, 0, meaning="threads per rank; 0: its part of the host's cores, as many as its models keep busy")


@dataclass(frozen=True)
class Data:
    """The images, and how they are dealt out to clients and to the server."""

    name: str = name_of("data set", "digits", besides="that of data of your own (hpcfl data import)",
                        meaning="the data set; digits and random are built in, the others come with: hpcfl data get")
    fraction: float = real(1.0, 0.0, 1.0, above=True, meaning="share of the official training set that the federation owns")
    partition: str = choice_of("partition", "iid", meaning="how the images are dealt out to the clients")
    alpha: float = real(0.1, 0.0, above=True, meaning="of dirichlet: the smaller, the more the classes of clients differ")
    classes_per_client: int = integer(2, 1, meaning="of shards: how many classes a client has", unit="classes")
    spread: float = real(1.0, 0.0, meaning="of lognormal: standard deviation of the logarithm of the clients' sizes")
    minimum: int = integer(10, 1, meaning="smallest shard that dirichlet and lognormal may give a client", unit="images")
    validation_fraction: float = real(0.1, 0.0, 0.5, meaning="share of each client's shard and of the public images that validates: the only "
                                                             "part that may select anything")
    test_fraction: float = real(0.1, 0.0, 0.5, meaning="share of each client's shard that is held out for personal accuracy")
    public_fraction: float = real(0.0, 0.0, 0.9, meaning="share of the federation's images that the server keeps and no client owns")
    image_size: int = integer(0, 0, meaning="edge to which images are resized; 0: as they are", unit="pixels")
    normalization: str = choice_of("range", "symmetric", "standard",
                                   meaning="the classifier's input; symmetric: [-1, 1]; unit: [0, 1]; standard: mean 0 and standard deviation 1 per channel")


@dataclass(frozen=True)
class Models:
    """The classifiers, and which client trains which."""

    names: tuple[str, ...] = names_of("model", "cnn1", besides="any of them narrower, as cnn5@0.75", meaning="the models; assignment says whose is which")
    assignment: str = choice_of("assignment", "cyclic",
                                meaning="cyclic: client k has name k mod m; blocks: as many clients in a row have each name, the last the rest")
    sizes: tuple[int, ...] = integers(0, meaning="size class e of client k mod m: every hidden width is multiplied by shrinkage^e")
    shrinkage: float = real(0.75, 0.0, 1.0, above=True, meaning="how much narrower a model is than that of the size class before")
    size_schedule: str = choice_of("size schedule", "fixed",
                                   meaning="whether size classes (or budgets) stay, move on by a client each round, or are drawn each round")
    memory_mb: tuple[float, ...] = reals(meaning="memory of client k mod m, which trains the largest size class that fits; empty: sizes counts", unit="MB")
    feature_size: int = integer(64, 0, meaning="common feature size p of all models; 0: each model's own")
    norm: str = choice_of("norm", "batch", meaning="normalisation; group has no running statistics to average")
    feature_relu: bool = flag(True, meaning="whether features end in a ReLU: one switch for all models, or their means do not compare")


@dataclass(frozen=True)
class Federation:
    """The clients, the rounds, and which clients answer."""

    clients: int = integer(10, 1, meaning="clients, on however many ranks")
    rounds: int = integer(10, 1, meaning="rounds of the method's main phase")
    participation: float = real(1.0, 0.0, 1.0, above=True, meaning="share of the clients in each round's cohort")
    server_rank: str = choice_of("server rank", "shared", meaning="whether rank 0 hosts clients too, or serves only")
    dropout: float = real(0.0, 0.0, 1.0, meaning="simulated: probability that a client of the cohort does not answer in a round")
    delay: str = choice_of("delay", "none", meaning="simulated: distribution of the time that a client takes to answer in a round")
    delay_mean: float = real(1.0, 0.0, above=True, meaning="simulated: mean of that time", unit="simulated seconds")
    delay_spread: float = real(1.0, 0.0, meaning="of lognormal: standard deviation of the logarithm of that time")
    deadline: float = real(0.0, 0.0, meaning="time after which an answer is not used; 0: the server waits", unit="simulated seconds")


@dataclass(frozen=True)
class Residency:
    """Where the states of clients lie that are not at work; no result depends on it."""

    location: str = choice_of("residency", "device", meaning="where states lie until their client's next turn")
    chunk: int = integer(0, 0, meaning="clients of one architecture that are on the device and trained together at most; 0: all")
    folder: str = text("", meaning="of disk: where; it may be local to the node; empty: the system's temporary folder")


@dataclass(frozen=True)
class Training:
    """The local training of classifiers."""

    epochs: int = integer(1, 1, meaning="passes over a client's own images in a round")
    batch: int = integer(32, 1, meaning="batch size", unit="images")
    augment: tuple[str, ...] = selection("augmentation", "mixture", meaning="what is done to training images, in this order")
    mix_alpha: float = real(1.0, 0.0, above=True, meaning="of mixup and cutmix: the share of each image is drawn from Beta(alpha, alpha)")
    optimizer: str = choice_of("optimizer", "sgd", meaning="update rule")
    lr: float = real(0.05, 0.0, above=True, meaning="learning rate, the same in all rounds")
    momentum: float = real(0.0, 0.0, 1.0, meaning="momentum of sgd")
    weight_decay: float = real(0.0, 0.0, meaning="L2 penalty, added to the gradient")
    clip: float = real(0.0, 0.0, meaning="bound on the gradient norm of each client; 0: none")
    engine: str = choice_of("engine", "auto", meaning="whether clients train one after the other or together; auto: sequential on a CPU, vmap on CUDA")
    precision: str = choice_of("precision", "auto", meaning="number format of losses and gradients; auto: float32, on a GPU without TF32")


@dataclass(frozen=True)
class Evaluation:
    """When and how models are evaluated."""

    every: int = integer(1, 1, meaning="interval of evaluations; the last round of a phase is always evaluated", unit="rounds")
    personal: bool = flag(True, meaning="whether each client's model is also evaluated on the client's own test images")
    batch: int = integer(250, 1, meaning="images per forward pass; the results do not depend on it", unit="images")
    flops: bool = flag(False, meaning="count the clients' operations in the first round of each phase, which then takes up to 3 times as long")


@dataclass(frozen=True)
class Checkpoint:
    """When the run is saved, and how many checkpoints are kept."""

    every: int = integer(10, 1, meaning="interval of checkpoints; the last round is always kept", unit="rounds")
    seconds: float = real(60.0, 0.0, meaning="a checkpoint also follows the round that passes this time, or earlier if cheap; 0: never", unit="seconds")
    keep: int = integer(2, 1, meaning="newest checkpoints that are kept, beside the best")


@dataclass(frozen=True)
class Timeouts:
    """How long silence may last."""

    collective: float = real(0.0, 0.0, meaning="time that a rank may wait for another before the run is ended; 0: for ever", unit="seconds")
    heartbeat: float = real(60.0, 0.0, meaning="time between the lines that a long round prints; 0: none", unit="seconds")


SECTIONS: dict[str, type | None] = {                               # in the order of a job file; [algorithm] has the Config of the algorithm that it names
    "run": Run, "data": Data, "models": Models, "federation": Federation, "residency": Residency, "training": Training, "algorithm": None,
    "evaluation": Evaluation, "checkpoint": Checkpoint, "timeouts": Timeouts}
