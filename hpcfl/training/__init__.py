"""Training and evaluation of Groups of clients."""
