"""The algorithms by name: each module has a Config (its [algorithm] settings) and a plan (its phases)."""
from hpcfl.algorithms import (
                              avgkd,
                              ccvr,
                              fedavg,
                              fedconv,
                              feddf,
                              fedgen,
                              fedgh,
                              fedproto,
                              fedprox,
                              fedrolex,
                              fedtgp,
                              fedvtc,
                              fml,
                              gaussian,
                              gefl,
                              gefl_f,
                              heterofl,
                              lg_fedavg,
                              standalone,
)

PLANS = {"standalone": standalone, "fedavg": fedavg, "fedprox": fedprox, "lg_fedavg": lg_fedavg, "avgkd": avgkd, "feddf": feddf, "fml": fml,
         "fedproto": fedproto, "fedtgp": fedtgp, "fedgh": fedgh, "fedgen": fedgen, "ccvr": ccvr, "gaussian": gaussian, "fedvtc": fedvtc,
         "gefl": gefl, "gefl_f": gefl_f,
         "heterofl": heterofl, "fedrolex": fedrolex, "fedconv": fedconv}
CONFIGS = {name: module.Config for name, module in PLANS.items()}
