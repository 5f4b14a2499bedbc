"""What a method is written against. All of it stands here; losses, generators, models and Tree functions are in the packages below.

A method is a module with two names. `Config` is a frozen dataclass of its settings, each a `choice`, `choice_of` or `name_of` a table, `flag`, `integer`,
`real` or `text` with its meaning, default and range. `plan(config, problem)` gives its `Phase`s in order; where it is one step, `plan = plan_rounds(Step)`.

A step is an `Algorithm`, and frozen. In each round of its phase the server says what clients may read (publish, a Tree); each `Group` of clients of one
architecture trains (train, by `Turn`s of losses) and gives an `Update`: the Group that it became, and the `Uplink` of `Sums` or `Uploads` that it sends;
the server learns from the `Totals` (aggregate); clients go on with what is new (refine). Each sees its site and nothing else: a `ClientSite` with the
`Holdings` of its own clients, or the `ServerSite`. What everybody knows is the `Problem`. The errors are those that methods raise: they say what to set.
"""
from hpcfl.contract.problem import Problem
from hpcfl.contract.sites import ClientSite, Holdings, ServerSite
from hpcfl.contract.step import Algorithm, Phase, Plan, Totals, Update, plan_rounds
from hpcfl.errors import DataError, JobError, LayoutError, NonFiniteError, TrainingError
from hpcfl.settings.fields import choice, choice_of, flag, integer, name_of, real, text
from hpcfl.training.group import Group
from hpcfl.training.turns import Turn
from hpcfl.wire.uplink import Sums, Uplink, Uploads

__all__ = ["Algorithm", "ClientSite", "DataError", "Group", "Holdings", "JobError", "LayoutError", "NonFiniteError", "Phase", "Plan", "Problem",
           "ServerSite", "Sums", "Totals", "TrainingError", "Turn", "Update", "Uplink", "Uploads", "choice", "choice_of", "flag", "integer", "name_of",
           "plan_rounds", "real", "text"]
