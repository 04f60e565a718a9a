"""A request to train: its schema, its rows, what it leaves open, and its way into the queue."""
