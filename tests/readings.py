"""Counting what Python reads of tensors: on a GPU each reading is a wait."""

from itertools import chain

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Readings(TorchDispatchMode):
    """Counts reads by Python of what comes from given tensors: on a GPU each is a wait."""

    def __init__(self, sources):
        super().__init__()
        self._kept = list(sources)  # alive, so that no other tensor takes their place in memory
        self._places = {x.untyped_storage().data_ptr() for x in self._kept}
        self.count = 0

    def _comes_from(self, tensors):
        return any(x.untyped_storage().data_ptr() in self._places for x in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        found = func(*args, **(kwargs or {}))
        if self._comes_from(taken):
            if func is torch.ops.aten._local_scalar_dense.default:
                self.count += 1
            # Operations on lists return nothing and write to what they were given.
            made = [x for x in chain(taken, tree_leaves(found)) if isinstance(x, torch.Tensor)]
            self._kept += made
            self._places |= {x.untyped_storage().data_ptr() for x in made}
        return found
