"""What a run stands on: recipes, its folder, files that are written whole, messages of the command line."""
