"""Bad input over every call: each case is refused by its name, stores nothing and changes no answer."""
