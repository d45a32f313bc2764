"""Reports: scores, tables and HTML pages.

Start with ``check_pages`` (``check_page``), one page of reports of checks. ``html`` renders pages, ``tables`` formats
tables for a terminal or a page, and ``scoring`` scores predictions.
"""

from probinfer.report.check_pages import check_page

__all__ = ["check_page"]
