"""Figures of features, curves and step times, and the HTML report of a run."""
