"""runs of several sizes -> a law that says what a larger one will reach."""
