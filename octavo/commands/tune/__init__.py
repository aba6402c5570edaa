"""`octavo tune`: measures on this GPU which recipe each linear layer should take.

linear_sizes.py   the model's linear layers and the sizes of their products, from a job
recipe_costs.py   the cost of a size in each recipe: measured on this GPU, or predicted by the roofline model
cost_cache.py     costs measured earlier
choice.py         the recipe of each layer, and the file that records it
"""
