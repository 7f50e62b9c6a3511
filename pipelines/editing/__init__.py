"""Editing: draws a part of given images again, and scores images by their likelihood."""
