"""Each operation of the client as steps, by noun."""
