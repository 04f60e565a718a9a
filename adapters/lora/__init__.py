"""LoRA mathematics: the base layer, the adapter with its canonical bytes, the mixed-adapter forward, and class labels.

Start with `adapter`, then `forward`. `kernel` is the compiled CPU version of the low-rank term.
"""
