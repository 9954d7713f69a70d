"""Prediction on images, exports, and a local page."""
