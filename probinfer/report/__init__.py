"""Reports: scores, tables, plots, and one page that holds them; the table of engines."""

from probinfer.report.check_pages import check_page

__all__ = ["check_page"]
