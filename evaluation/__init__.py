"""What eval.py measures, and how it shows it."""
