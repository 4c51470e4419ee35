"""`everest study DIR`: the paper's comparisons in miniature, on the demo data, by this project's own commands."""

from everest_ds.study.runs import Scale, StudyOptions, make_jobs, study

__all__ = ["Scale", "StudyOptions", "make_jobs", "study"]
