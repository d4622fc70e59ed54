"""The demo and what it is made of: its model, its task, its fine-tunes."""
