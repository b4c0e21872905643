"""Training: the parts of train.py's loop."""
