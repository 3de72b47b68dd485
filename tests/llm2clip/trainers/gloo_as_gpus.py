"""The command `llm2clip`, with accelerate told that its processes on the CPU are GPUs.

Accelerate shards only on GPUs, although `fully_shard` of torch works on a CPU: so it calls that here.
"""

from __future__ import annotations

import os
import sys

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from llm2clip import cli

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    sys.exit(cli.main())
