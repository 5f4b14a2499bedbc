"""Data sets: where they come from, their partition among clients, and batches of them."""
