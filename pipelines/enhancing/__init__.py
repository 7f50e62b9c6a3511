"""Enhancing images: the method `enhance` of a pipeline and the command."""
