"""Learning of one more step from a folder of images and masks (`starseg learn`)."""
