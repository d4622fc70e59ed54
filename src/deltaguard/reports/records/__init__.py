"""The schemas of reports."""
