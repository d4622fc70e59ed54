"""Running the aligned model over safety conversations to measure its curvature."""
