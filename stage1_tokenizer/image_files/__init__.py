"""Reading image files to pixels, whatever the format and depth."""
