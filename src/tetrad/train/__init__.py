"""The stages: one algorithm, one file, read top to bottom like a script. No trainer hierarchy, no callbacks."""
