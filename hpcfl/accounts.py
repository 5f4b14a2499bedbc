"""Accounts: the names under which a run books seconds and bytes, and the schema of metrics.h5."""

SECONDS = ("train", "idle", "combine", "aggregate", "publish", "refine", "evaluate", "checkpoint", "spread")            # kinds of a rank's time
EXCHANGES = ("bcast", "reduce", "gatherv", "send", "bcast_by_client", "reduce_by_client")            # kinds of bytes that ranks carry

RECORD_VERSION = 1
SHAPES = {                                                         # of a dataset, or of all datasets of a group, an axis a letter: R rounds, K clients,
    # C classes, E evaluations, G models of the federation, I intervals of the timeline, S clients with samples, "." any length
    "rounds": "R", "train": "RK", "bytes": "RK", "bytes/transported": "R.", "seconds": "R.", "wire": "R", "server": "R",
    "evaluation": "EKC", "evaluation/at": "E", "evaluation/stage": "E", "evaluation/global_correct": "EGC", "evaluation/global_names": "G",
    "evaluation/generalization_count": "C", "evaluation/personal_count": "KC", "evaluation/validation_count": "KC", "partition": "KC", "clients": "K",
    "trace": "I", "trace/kinds": ".", "conditions": "RK", "conditions/duration_s": "R",
    "samples/synthetic": "SC....", "samples/has": "SC", "samples/real": "C....", "samples/client": "S"}
GROWING = {"R": "rounds/phase", "E": "evaluation/at", "I": "trace/row"}               # axes that rounds add to, and a dataset that has it
ROW = {"E": "evaluation/at", "I": "trace/row"}                     # which dataset says to which round an entry of the axis belongs
MODELS = ("evaluation/global_names", "evaluation/global_correct")
REQUIRED = ("rounds/round", "rounds/wall_s", "bytes/simulated_up", "bytes/simulated_down", "bytes/transported")
MISSING = {"conditions/answered": -1, "conditions/duration_s": 0.0}  # what stands for what was not recorded, where it is not NaN, or -1 of right answers
