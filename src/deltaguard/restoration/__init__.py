"""From an aligned and a fine-tuned checkpoint to a restored one: plan, solve, write, verify."""
