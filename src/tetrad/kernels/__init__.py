"""Matrix products with the machine's fastest kernel."""
