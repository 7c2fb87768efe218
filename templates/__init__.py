"""Jinja templates of the emitted file, as the package `convgen.templates`."""
