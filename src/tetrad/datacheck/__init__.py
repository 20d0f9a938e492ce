"""What `tetrad check` computes: every problem in a recipe and its data that training would run into. No torch."""
