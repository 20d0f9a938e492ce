"""A recipe from its file to its results: validation, plan, preflight checks, run, and status. No torch."""
