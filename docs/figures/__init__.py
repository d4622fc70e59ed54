"""The pictures of the documentation, each drawn by a script: `python -m docs.figures.one_layer`."""
