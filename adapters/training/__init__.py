"""Training one adapter: what is asked for, the data, the methods, and the process that runs them."""
