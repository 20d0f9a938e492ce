"""From files to records to packed tokens. No torch."""
