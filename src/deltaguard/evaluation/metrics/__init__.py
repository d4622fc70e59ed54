"""Rates and means with intervals, paired comparisons, and the agreement of judges."""
