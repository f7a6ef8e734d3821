"""Pages of ours, as Jinja templates."""
