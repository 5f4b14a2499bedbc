"""HeteroFL (Diao, Ding and Tarokh, ICLR 2021, arXiv 2010.01264): a client trains the leading channels of every layer, as many as its width allows."""
from hpcfl.algorithms.submodel import Config as Config
from hpcfl.algorithms.submodel import SubModel
from hpcfl.contract import plan_rounds


class HeteroFL(SubModel):
    """Slices that never move, so that narrow ones lie inside wide ones; the channels that only wide clients have learn from these alone."""

    def shift(self, round_: int) -> int:
        return 0


plan = plan_rounds(HeteroFL)
