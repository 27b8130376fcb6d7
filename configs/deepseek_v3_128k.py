"""DeepSeek-V3's second long-context stage: 1000 steps of 131,072 tokens (arXiv:2412.19437, section 4.3).

    python -m moejax train configs/deepseek_v3_128k.py --data.train TEXT... --resume-from runs/deepseek_v3_32k

The first stage's settings (deepseek_v3_32k.py), whose weights it starts with, with longer sequences in batches of 480.
"""

from dataclasses import replace
from pathlib import Path

from moejax import load_config
from moejax.config import RunConfig


def config() -> RunConfig:
    """The run."""
    first = load_config(Path(__file__).with_name("deepseek_v3_32k.py"))
    data = replace(first.data, sequence_length=131072, batch_size=480)
    return replace(first, name="deepseek_v3_128k", resume_from="runs/deepseek_v3_32k", data=data)
