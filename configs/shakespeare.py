"""Character by character, with the sizes of nanoGPT's small model for CPU: 4 layers, width 128, context 64, batch 12.

    python -m moejax train configs/shakespeare.py --data.train shakespeare.txt

The text is one file, of which the last tenth is for validation, as in nanoGPT; a character of it is a byte. Expect a
validation loss of 1.64 nats per character after the 2000 steps, where nanoGPT states 1.88 for as many steps of 12 x 64
characters. (This model has 2.4 million parameters, 0.9 million of them per character; nanoGPT's has 0.8 million.)
"""

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
        name="shakespeare",
        steps=2000,
        precision="fp32",
        model=ModelConfig(
            vocab_size=264,
            hidden_size=128,
            num_layers=4,
            num_dense_layers=1,
            dense_width=512,
            attention=AttentionConfig(
                num_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_dim=32, qk_rope_dim=16, v_dim=32
            ),
            moe=MoEConfig(num_experts=8, num_shared=1, top_k=2, num_groups=1, top_groups=1, expert_width=128),
            init_std=0.02,
            remat="none",
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3, beta2=0.99, moments="fp32"),
        schedule=ScheduleConfig(
            warmup_steps=100,
            learning_rate=(Phase(until=0.3, value=1.0), Phase(until=1.0, value=0.1, shape="cosine")),
        ),
        data=DataConfig(
            train=("shakespeare.txt",),
            valid_fraction=0.1,
            sequence_length=64,
            batch_size=12,
            virtual_shards=4,
            fim_rate=0.0,
        ),
        log=LogConfig(valid_every=250, valid_batches=50, pictures_every=250, prompt="ROMEO:"),
    )
