"""The algorithms by name: each module has a Config (its [algorithm] settings) and a plan (its phases)."""
from hpcfl.algorithms import fedavg, fedconv, fedproto, fedrolex, fedvtc, gaussian, heterofl, standalone

PLANS = {"standalone": standalone, "fedavg": fedavg, "fedproto": fedproto, "fedvtc": fedvtc, "gaussian": gaussian, "heterofl": heterofl,
         "fedrolex": fedrolex, "fedconv": fedconv}
CONFIGS = {name: module.Config for name, module in PLANS.items()}
