"""Learning a stream of tasks without forgetting (PMoE, arXiv 2407.21571).

Data: `tasks`, `text`, `images` and `classification` (a `Problem` each), `buffers`, `features`.
Methods: `learner` (PMoE) and `methods/` (baselines), by name in `registry`. Runs over a stream: `run`
(one method), `compare` (several). Results: `matrix`, `scores`, `results`.
"""

from .calibration import calibration_of
from .classification import ClassificationProblem, class_stream
from .features import FeatureCache
from .images import ImageProblem
from .learner import Learner
from .matrix import ScoreMatrix
from .tasks import Task, read_stream
from .text import TextProblem
from .training import Training

__all__ = [
    "ClassificationProblem",
    "FeatureCache",
    "ImageProblem",
    "Learner",
    "ScoreMatrix",
    "Task",
    "TextProblem",
    "Training",
    "calibration_of",
    "class_stream",
    "read_stream",
]
