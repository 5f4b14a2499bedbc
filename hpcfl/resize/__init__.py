"""Networks whose weights are computed from other networks' weights."""
