"""What the fine-tuning service withstands: kills, many clients at once, requests made from its own schema."""
