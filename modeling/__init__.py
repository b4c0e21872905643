"""Parts of the model and of its search; models.py puts them together."""
