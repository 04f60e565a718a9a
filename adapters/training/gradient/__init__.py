"""Gradient descent on a stack of adapters at once, each with the result that it has when it is trained alone.

Start with `training_loop`, then `stack`. `batches` explains why the rows are padded to a few shapes.
"""
