"""hpcfl: an MPI simulator for model-heterogeneous federated learning."""
__version__ = "0.1.0"
