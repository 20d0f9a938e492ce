"""Products by the fastest kernel of the machine."""
