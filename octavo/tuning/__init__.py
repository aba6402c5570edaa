"""Which recipe each linear layer should take on this GPU: what `octavo tune` does, step by step.

layers.py   the model's linear layers and the sizes of their products, from a job
costs.py    what a size costs in each recipe: measured on this GPU, or by the roofline model
cache.py    what was measured before
choice.py   the recipe of each layer, and the file that says so
"""
