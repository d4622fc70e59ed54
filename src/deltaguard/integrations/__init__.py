"""The same restore where people already train."""
