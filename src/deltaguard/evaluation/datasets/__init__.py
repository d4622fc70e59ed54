"""Public data sets by name, from a file or from the Hub. None is shipped."""
