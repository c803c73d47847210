"""A device that there is not: its bus brings copies late, as a GPU's does."""

import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

# For a bus that is closed: the test that closed it is to open it again.
PATIENCE_S = 20.0


class LateBus:
    """See Bus in common/engine/device_pages.py.

    delay_s  that each copy takes
    open     cleared: what leaves does not come until it is set
    breaks   so many of the next copies fail
    left     copies that were asked for
    waited   those of them that whoever asked waited for
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self._delay_s = delay_s
        self.open = threading.Event()
        self.open.set()
        self.breaks = 0
        self.left = 0
        self.waited = 0

    def leave(self, rows: torch.Tensor) -> Callable[[], np.ndarray]:
        self.left += 1
        return partial(self._come, rows, threading.get_ident())

    def bring(self, rows: np.ndarray) -> torch.Tensor:
        # What it came from may be written right after this.
        return torch.from_numpy(rows.copy())

    def _come(self, rows: torch.Tensor, asked_by: int) -> np.ndarray:
        self.waited += threading.get_ident() == asked_by
        assert self.open.wait(PATIENCE_S), "the bus was closed and not opened again"
        time.sleep(self._delay_s)  # what a bus takes
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("the bus broke")
        return rows.numpy()
