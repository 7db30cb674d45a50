"""A file a plot: `draw(runs)` gives the figure, the docstring is its caption."""
