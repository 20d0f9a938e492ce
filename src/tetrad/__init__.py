"""Tetrad: a causal language model the whole way, from text to PPO. Importing it imports no torch."""

__version__ = "0.1.0"
