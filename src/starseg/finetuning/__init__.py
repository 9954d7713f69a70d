"""`starseg learn`: one more step from a folder of photos and masks."""
