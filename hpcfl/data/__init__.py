"""Samples: corpora, their partition among clients, and batches."""
