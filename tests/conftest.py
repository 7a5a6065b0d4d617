"""Tests work on small tensors: waking a second thread for them costs more than it brings, and where the machine
has other work, many times more. Processes that tests start decide for themselves.
"""

from __future__ import annotations

import torch

torch.set_num_threads(1)
