"""Engines: what generates answers, in this process or on a server."""
