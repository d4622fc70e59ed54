"""Judging answers and measuring models."""
