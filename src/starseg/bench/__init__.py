"""Time and memory of training and evaluation (`starseg bench`)."""
