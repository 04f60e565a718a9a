"""Import and export of PEFT files: the config, the weights, and the zip archive that holds both.

Start with `weights`, which maps PEFT's tensor names to A, B and bias. Every limit is checked before memory is used.
"""
