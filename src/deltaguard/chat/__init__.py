"""Conversations, chat templates, prompts, generation and likelihoods."""
