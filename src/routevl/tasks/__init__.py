"""Tasks: what goes in, what is learned, what comes out.

To add a task: a module beside these with a subclass of `tasks.base.Task` and one row in TASKS.
"""

from routevl.tasks.captioning import CaptionTask
from routevl.tasks.vqa import VqaTask

# value of the run sheet's column `task` -> class
TASKS = {"vqa": VqaTask, "caption": CaptionTask}
