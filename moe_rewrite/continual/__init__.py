"""Learning a stream of tasks without forgetting (PMoE, arXiv 2407.21571).

The data: `tasks`, `text`, `images` (a `Problem` each), `buffers`, `features`. The methods:
`learner` (PMoE) and `methods/` (its rivals), by name in `registry`. A run of one over a stream:
`run`, of several side by side: `compare`; what came out: `matrix`, `scores`, `results`.
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
