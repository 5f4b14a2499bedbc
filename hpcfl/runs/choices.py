"""Choices: the table behind each setting of a job that names something; a job is read with them."""
from collections import ChainMap

from hpcfl.algorithms import CONFIGS
from hpcfl.data.augment import OF_BATCHES, OF_IMAGES
from hpcfl.data.embedded import EMBEDDED
from hpcfl.data.partition import SCHEMES
from hpcfl.data.shards import RANGES
from hpcfl.data.sources import PUBLISHED
from hpcfl.federation.answers import DELAYS
from hpcfl.federation.placement import HOSTS
from hpcfl.federation.residency import RESIDENCIES
from hpcfl.models.norms import NORMS
from hpcfl.models.sizes import ASSIGNMENTS, SCHEDULES
from hpcfl.models.zoo import ENTRIES
from hpcfl.settings.fields import Choices
from hpcfl.training.compiling import COMPILING
from hpcfl.training.fit import ENGINES, PRECISIONS
from hpcfl.training.optimizers import RULES

CHOICES: Choices = {
    "algorithm": CONFIGS, "assignment": ASSIGNMENTS, "augmentation": OF_IMAGES, "compiling": COMPILING, "data set": ChainMap(PUBLISHED, EMBEDDED),
    "delay": DELAYS, "engine": ENGINES, "mixture": OF_BATCHES, "model": ENTRIES, "norm": NORMS, "optimizer": RULES, "partition": SCHEMES,
    "precision": PRECISIONS, "range": RANGES, "residency": RESIDENCIES, "server rank": HOSTS, "size schedule": SCHEDULES}
