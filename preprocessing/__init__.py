"""Images and captions -> the files that training reads."""
