"""Classifiers, cut into features and head."""
