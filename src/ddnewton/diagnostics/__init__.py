"""What steps were made of, as plain numbers: directions summed up, runs logged as JSON lines."""

from ddnewton.diagnostics.directions import Info, Summary, summary
from ddnewton.diagnostics.run import append, read, run_file
from ddnewton.diagnostics.written import plain, summaries

__all__ = ["Info", "Summary", "append", "plain", "read", "run_file", "summaries", "summary"]
