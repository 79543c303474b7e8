"""An evaluation as a web page that needs no network: ``report.html``, plots, and every question's answers."""

from rapid_integrations.evaluation.page.writing import check_page, write_page

__all__ = ["check_page", "write_page"]
