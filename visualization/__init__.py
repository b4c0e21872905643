"""Pictures, HTML pages and animations of attention, training curves and beam search."""
