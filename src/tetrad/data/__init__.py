"""Files to records to packed tokens. No torch."""
