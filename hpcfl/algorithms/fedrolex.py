"""FedRolex (Alam et al., NeurIPS 2022, arXiv 2212.01548): a client trains a window of the channels of every layer that moves on by one each round."""
from hpcfl.algorithms.submodel import Config as Config
from hpcfl.algorithms.submodel import SubModel
from hpcfl.contract import plan_rounds


class FedRolex(SubModel):
    """Round t keeps the channels (t + i) mod n, i < m, of a layer of n, so that all of them are trained in turn.

    The paper leaves scaler, masked loss and weights open; its published code has those of HeteroFL, hence the same defaults.
    """

    def shift(self, round_: int) -> int:
        return round_


plan = plan_rounds(FedRolex)
