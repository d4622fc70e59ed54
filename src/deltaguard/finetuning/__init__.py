"""Fine-tuning a small model, and the conversations it is fine-tuned on."""
