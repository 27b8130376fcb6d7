"""About 100 million parameters, for one GPU, on the user's own text.

    moejax train-tokenizer text/ --vocab-size 32768 --out tokenizer.json
    python -m moejax train configs/small_moe.py --data.train text/

One dense layer, then 7 with 32 experts in 4 groups, of which a token uses 4 in 2; BF16 compute.
"""

from moejax.config import (
    AttentionConfig,
    CheckpointConfig,
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
        name="small_moe",
        steps=10_000,
        precision="bf16",
        model=ModelConfig(
            vocab_size=32768,
            hidden_size=512,
            num_layers=8,
            num_dense_layers=1,
            dense_width=1408,
            attention=AttentionConfig(
                num_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_dim=64, qk_rope_dim=32, v_dim=64
            ),
            moe=MoEConfig(num_experts=32, num_shared=1, top_k=4, num_groups=4, top_groups=2, expert_width=128),
            init_std=0.02,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        schedule=ScheduleConfig(
            warmup_steps=500,
            learning_rate=(Phase(until=0.7, value=1.0), Phase(until=1.0, value=0.1, shape="cosine")),
        ),
        data=DataConfig(tokenizer="tokenizer.json", sequence_length=1024, batch_size=64),
        checkpoint=CheckpointConfig(every_steps=1000),
        log=LogConfig(valid_every=500),
    )
