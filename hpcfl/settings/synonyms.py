"""Synonyms: what papers and other simulators call a setting, and which one somebody meant who wrote a key that does not exist."""
from collections.abc import Collection, Mapping
from typing import Any

from hpcfl.wording import did_you_mean, nearest

MEANT = {                                                          # a setting -> other words for it, without underscores
    "run.name": "experiment experimentname expname runname",
    "run.seed": "randomseed globalseed",
    "run.device": "gpu gpus cuda usecuda deviceid",
    "run.threads": "numthreads nthreads numworkers workers",
    "data.name": "dataset datasetname dataname",
    "data.partition": "niid noniid partitioner partitionmethod partitiontype",
    "data.alpha": "dirichletalpha diralpha concentration",
    "data.classes_per_client": "classesperuser numclassesperclient shardsperclient",
    "data.validation_fraction": "valfraction valsplit validationsplit validationfraction",
    "data.test_fraction": "testsize testfraction testsplit",
    "data.image_size": "imagesize imgsize resize resolution",
    "data.normalization": "normalize normalise normalization normalisation",
    "models.names": "model modelname modelfamily arch architecture architectures backbone net",
    "models.feature_size": "featuredim featuresize embeddingdim",
    "federation.clients": "numclients nclients clientnum clientnumintotal totalclients numusers nparties numparties",
    "federation.rounds": "numrounds nrounds globalrounds commround commrounds communicationrounds globalepochs",
    "federation.participation": "joinratio fractionfit frac clientfraction clientsperround clientnumperround cohortsize samplerate participationrate "
                                "samplingrate",
    "federation.dropout": "dropoutrate droprate clientdroprate",
    "training.epochs": "localepochs localep numepochs nepochs",
    "training.batch": "batchsize localbatchsize localbs bs",
    "training.optimizer": "optim optimiser clientoptimizer localoptimizer",
    "training.lr": "learningrate locallearningrate clientlr locallr eta stepsize",
    "training.weight_decay": "wd l2 l2penalty",
    "training.clip": "gradclip gradientclipping clipnorm maxgradnorm maxnorm",
    "training.precision": "amp mixedprecision dtype",
    "training.augment": "augmentation augmentations dataaugmentation transform transforms",
    "algorithm.name": "strategy method aggregator aggregation",
    "evaluation.every": "evalevery evalgap evalinterval testevery testinterval",
    "checkpoint.every": "saveevery saveinterval checkpointevery",
    "timeouts.collective": "timeout",
}
ABSENT = {                                                         # what hpcfl does instead -> words for what it has no setting for
    "the learning rate is the same in all rounds: training.lr": "scheduler lrscheduler lrdecay learningratedecay lrschedule warmup",
    "the run folder is named on the command line: --out DIR": "out output outputdir outdir savedir logdir resultsdir folder",
}
SECTIONS = {"training": "optimizer train client_training", "models": "model", "data": "dataset", "federation": "server fl", "algorithm": "strategy method",
            "evaluation": "eval test", "run": "general experiment", "checkpoint": "checkpoints"}


def suggest_setting(section: str, key: str, value: Any, known: Mapping[str, Collection[str]]) -> str:
    """What to say of a key that a section does not have: "; did you mean 'training.lr'?", another sentence, or nothing. `known`: the keys of each section."""
    inner = next(iter(value), "") if isinstance(value, Mapping) else ""
    head, dot, rest = f"{key}.{inner}".rstrip(".").partition(".")
    if dot and rest in known.get(head, ()):
        return f"; did you mean '{rest}'{', without the name of its section' if head == section else f' in [{head}]'}?"
    plain = _plain(key)
    same = [name for name in known.get(section, ()) if _plain(name) == plain]
    meant = [name for name, words in MEANT.items() if plain in words.split()]
    elsewhere = [f"{other}.{name}" for other, names in known.items() for name in names if other != section and _plain(name) == plain]
    if found := [f"{section}.{name}" for name in same] or meant or elsewhere:
        return did_you_mean(*found)
    told = next((sentence for sentence, words in ABSENT.items() if plain in words.split()), "")
    return f"; {told}." if told else did_you_mean(nearest(key, known.get(section, ())))


def suggest_section(name: str, known: Collection[str]) -> str:
    """"; did you mean 'training'?" of a section that does not exist, or nothing."""
    return did_you_mean(next((meant for meant, words in SECTIONS.items() if name.lower() in words.split()), "") or nearest(name, known))


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")
