"""Learning a stream of tasks without forgetting (PMoE, arXiv 2407.21571).

Data: `tasks`, `text` and `images` (a `Problem` each), `buffers`, `features`. Methods: `learner`
(PMoE) and `methods/` (baselines), by name in `registry`. Runs over a stream: `run` (one method),
`compare` (several). Results: `matrix`, `scores`, `results`.
"""

from .features import FeatureCache
from .images import ImageProblem
from .learner import Learner
from .matrix import ScoreMatrix
from .tasks import Task, read_stream
from .text import TextProblem
from .training import Training

__all__ = [
    "FeatureCache",
    "ImageProblem",
    "Learner",
    "ScoreMatrix",
    "Task",
    "TextProblem",
    "Training",
    "read_stream",
]
