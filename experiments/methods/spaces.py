"""Where a random search draws each method's designs from: all rivals get as many draws as ours."""

from collections.abc import Callable
from typing import Any

import numpy as np

Space = Callable[[np.random.Generator], dict[str, Any]]
