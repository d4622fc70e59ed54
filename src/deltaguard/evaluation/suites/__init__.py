"""Suites: what models are asked, and who judges the answers, as YAML that users copy and edit."""
