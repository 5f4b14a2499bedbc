"""What a method is: the interface that algorithms are written against, and all that they need of settings, errors and the wire."""
from hpcfl.contract.problem import Problem
from hpcfl.contract.sites import ClientSite, Holdings, ServerSite
from hpcfl.contract.step import Algorithm, Phase, Plan, Totals, Update
from hpcfl.errors import DataError, JobError, LayoutError, NonFiniteError, TrainingError
from hpcfl.settings.fields import choice, choice_of, flag, integer, name_of, real, text
from hpcfl.wire.uplink import Sums, Uplink, Uploads

__all__ = ["Algorithm", "ClientSite", "DataError", "Holdings", "JobError", "LayoutError", "NonFiniteError", "Phase", "Plan", "Problem", "ServerSite",
           "Sums", "Totals", "TrainingError", "Update", "Uplink", "Uploads", "choice", "choice_of", "flag", "integer",
           "name_of", "real", "text"]
