"""The report: what a plan made of a model, and what was measured, as one page."""

from rankwise.report.page import write_report

__all__ = ["write_report"]
