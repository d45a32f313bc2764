"""Reports: scores, tables, plots, and one page that holds them; the table of engines."""

__all__: list[str] = []
