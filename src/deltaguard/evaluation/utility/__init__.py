"""How well a model does what it was fine-tuned for: scores of answers, and the likelihood of right ones."""
