"""The web demo: a gradio page, and a guard that checks each request before gradio sees it."""
