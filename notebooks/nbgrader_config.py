"""nbgrader's settings for this course, for `build.py` and for instructors who release and grade with nbgrader."""

c = get_config()  # noqa: F821 - nbgrader provides it

# An untouched notebook runs to its end: what is not filled in does nothing, and labkit.check says so.
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\npass"}
c.ExecutePreprocessor.timeout = 1800  # seconds; a cell may wait for a fine-tuning job
