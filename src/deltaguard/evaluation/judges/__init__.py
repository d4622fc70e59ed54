"""Judges: who tells a refusal from compliance, and whether an answer makes sense at all."""
