"""A converted model is copied, but not pickled: its graphs could not be read again."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, Self

from ..errors import CheckpointError


class NotPickled:
    """Base of a module that `copy` copies and `pickle` (so `torch.save` of it) refuses."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CheckpointError(
            "a converted model cannot be pickled (torch.save, multiprocessing): its graphs could not "
            "be read again. Save it with save_pretrained(folder) and read it with "
            "moe_rewrite.load(folder, model); or save state_dict(), for a model that is converted "
            "in the same way"
        )

    def __deepcopy__(self, memo: dict) -> Self:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__ = dict(self.__dict__)
        return made
