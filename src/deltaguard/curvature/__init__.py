"""Curvature of a model's linear layers: measured on safety conversations, and kept in a store."""

from typing import Literal

Rank = Literal["auto", "full"]
"""How much a store keeps.

`auto`: as many eigenpairs as a quarter of the model's bytes hold. `full`: everything.
"""
