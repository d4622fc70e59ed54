"""deltaguard."""
