"""Training: the step, the loop, what a run writes down, and steps on a device.

``config`` what a run is told; ``examples`` a data set in the backend's memory; ``step`` one step;
``loop`` all of them; ``record`` metrics, checkpoints and resume; ``device`` captured steps.
"""

from .config import RunConfig, TrainConfig, run_memory, run_work, step_work
from .loop import train
from .record import Diverged
from .step import Learner, evaluate

__all__ = ["Diverged", "Learner", "RunConfig", "TrainConfig", "evaluate", "run_memory", "run_work",
           "step_work", "train"]
