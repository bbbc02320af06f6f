"""A model, data and a wish in; a recipe, a cheaper model and a report out."""
