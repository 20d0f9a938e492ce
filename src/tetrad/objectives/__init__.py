"""Losses, advantages and metrics as pure functions of tensors. Imports torch and the products of `kernels` only."""
