"""Settings for every nbgrader command, the form grader and JupyterLab's Validate button on this tree.

`notebooks/` is what is released. What an instructor grades stands in `graded/`, which `course grade` fills.
"""

from pathlib import Path

from autograde.execute import AUTOGRADE_PREPROCESSORS
from autograde.feedback import FEEDBACK_PREPROCESSORS

c = get_config()  # noqa: F821
_root = Path(__file__).resolve().parent

c.CourseDirectory.root = str(_root)
c.CourseDirectory.release_directory = "notebooks"
c.CourseDirectory.source_directory = "graded/source"
c.CourseDirectory.submitted_directory = "graded/submitted"
c.CourseDirectory.autograded_directory = "graded/autograded"
c.CourseDirectory.feedback_directory = "graded/feedback"
c.CourseDirectory.db_url = f"sqlite:///{_root / 'graded' / 'gradebook.db'}"

# Seconds a cell: nbgrader's 30 are too few for a cell that trains. The same as `course check` allows.
c.Execute.timeout = 300
# Validation would count any text on stderr as a failure, even a warning; shown as stdout it is only shown.
c.Execute.extra_arguments = ["--IPKernelApp.exec_lines=import sys; sys.stderr.name = 'stdout'; del sys"]
c.Autograde.autograde_preprocessors = AUTOGRADE_PREPROCESSORS
c.GenerateFeedback.preprocessors = FEEDBACK_PREPROCESSORS
