"""The second moment of each layer's inputs, and the store that keeps it with its factor."""
