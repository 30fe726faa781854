"""Records of steps as plain numbers: a summary of every direction, a log of JSON lines."""

from ddnewton.diagnostics.direction_summary import Info, Summary, summary
from ddnewton.diagnostics.json_records import plain, summaries
from ddnewton.diagnostics.log import append, read, run_file

__all__ = ["Info", "Summary", "append", "plain", "read", "run_file", "summaries", "summary"]
