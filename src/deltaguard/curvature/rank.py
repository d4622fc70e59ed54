"""How much a store keeps; apart from the rest because it needs no torch."""

from typing import Literal

Rank = Literal["auto", "full"]
"""`auto`: as many eigenpairs as a quarter of the model's bytes hold. `full`: everything."""
