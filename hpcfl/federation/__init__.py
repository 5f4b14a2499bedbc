"""The loop: clients placed on ranks, rounds, and what server and clients exchange in a round."""
