"""HTTP: a model to talk to, a reward model to score with, and pages for both."""
