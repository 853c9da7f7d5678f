"""How a network learns: the recipe, the one loop, and how well it does."""
