"""Saving and restoring the state of a run; knows pytrees and files, no model."""
