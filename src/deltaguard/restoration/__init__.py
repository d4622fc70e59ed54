"""From an aligned and a fine-tuned checkpoint to a restored one: plan, solve layer by layer, write, verify."""
