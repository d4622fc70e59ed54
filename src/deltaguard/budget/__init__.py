"""What a candidate costs in safety, measured with real forward passes."""
