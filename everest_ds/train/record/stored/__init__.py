"""Read a run directory for a report: needs no torch and tolerates damaged files."""
