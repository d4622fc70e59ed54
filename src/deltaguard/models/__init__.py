"""Checkpoints on disk: a lazy view of them, adapters over them, and an atomic writer."""
