"""A small V3-shaped model on text that every machine has: the source of Python's own standard library.

    make train
    python -m moejax train configs/tiny.py

Every part of DeepSeek-V3 is there: latent attention, a leading dense layer, 16 experts in 4 groups of which a token
uses 4 in 2, one shared expert, one MTP module. The 8 MoE layers, the 16 experts and the 32 rows of a batch divide over
every mesh of 8 devices.
"""

import sysconfig

from moejax.config import (
    AttentionConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    Phase,
    RunConfig,
    ScheduleConfig,
)


def config() -> RunConfig:
    """The settings of the run."""
    return RunConfig(
        name="tiny",
        steps=160,
        precision="fp32",
        model=ModelConfig(
            vocab_size=264,  # bytes and 6 special tokens, rounded up to a multiple of 8
            hidden_size=128,
            num_layers=9,
            num_dense_layers=1,
            dense_width=384,
            attention=AttentionConfig(
                num_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_dim=32, qk_rope_dim=16, v_dim=32, block=32
            ),
            moe=MoEConfig(num_experts=16, num_shared=1, top_k=4, num_groups=4, top_groups=2, expert_width=64),
            init_std=0.02,
            remat="none",
        ),
        optimizer=OptimizerConfig(peak_lr=2e-3, moments="fp32"),
        schedule=ScheduleConfig(
            warmup_steps=20,
            learning_rate=(Phase(until=0.5, value=1.0), Phase(until=1.0, value=0.1, shape="cosine")),
            bias_update_speed=(Phase(until=0.97, value=0.01), Phase(until=1.0, value=0.0)),  # a short run: faster
        ),
        data=DataConfig(
            train=(f"{sysconfig.get_paths()['stdlib']}/**/*.py",),
            exclude=("site-packages", "dist-packages"),
            sequence_length=128,
            batch_size=32,
            valid_fraction=0.03,
            fim_rate=0.0,
        ),
        log=LogConfig(valid_every=50, pictures_every=50, prompt="import ", sample_tokens=120),
    )
