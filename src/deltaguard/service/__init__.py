"""The fine-tuning service: jobs come in by the OpenAI client, and only models that pass a gate go out."""
