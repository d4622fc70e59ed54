"""Tools of the repository; the package does not need them."""
