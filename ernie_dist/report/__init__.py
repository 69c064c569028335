"""What a person keeps of a run: one page, one picture, and the numbers behind them."""

from ernie_dist.report.data import RunSummary, StageSummary, collect
from ernie_dist.report.page import build_report

__all__ = ["RunSummary", "StageSummary", "build_report", "collect"]
