"""A recipe from its file to its results: checked, planned, looked over before it starts, run, and shown. No torch."""
