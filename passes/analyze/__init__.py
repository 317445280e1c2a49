"""Analyses: what can be said of a model; each gives a report and changes nothing."""
