"""Networks whose weights are made of other networks' weights."""
