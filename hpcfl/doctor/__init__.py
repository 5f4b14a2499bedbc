"""Checks of a machine and a job before a run."""
