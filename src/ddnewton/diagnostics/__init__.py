"""What steps were made of, as plain numbers: directions summed up, runs logged as JSON lines."""

from ddnewton.diagnostics.direction_summary import Info, Summary, summary
from ddnewton.diagnostics.json_records import plain, summaries
from ddnewton.diagnostics.log import append, read, run_file

__all__ = ["Info", "Summary", "append", "plain", "read", "run_file", "summaries", "summary"]
