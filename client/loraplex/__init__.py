"""Client and command line of loraplex."""
