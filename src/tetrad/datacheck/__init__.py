"""What `tetrad check` computes: everything in a recipe and its data that training would stumble over. No torch."""
