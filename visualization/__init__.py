"""Pictures, pages and animations of attention, curves and beam search."""
