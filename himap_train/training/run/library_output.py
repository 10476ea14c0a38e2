"""What libraries print beside a run, and nobody needs."""

from __future__ import annotations

import logging
import sys
import warnings

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """No advertisements, no bars in log files, no warnings about what is meant as it is."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # the frozen vision tower
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing. is deprecated")  # PEFT asks for it
    warnings.filterwarnings("ignore", message=r".*does not have many workers")
    warnings.filterwarnings("ignore", message=r".*LeafSpec")
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")  # nothing to validate on
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated")  # DeepSpeed calls it
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
