"""What the documentation needs of Sphinx and does not find there."""
