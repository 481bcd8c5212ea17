"""Metrics of features on classes that were not trained on, and their intervals over seeds."""
