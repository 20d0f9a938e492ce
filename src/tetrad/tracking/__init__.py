"""Trackers: where others look at a run."""
