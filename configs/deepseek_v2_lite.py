"""DeepSeek-V2-Lite, 16B, with its published pre-training recipe (arXiv:2405.04434, appendix B).

    python -m moejax train configs/deepseek_v2_lite.py --data.train TEXT... --data.tokenizer tokenizer.json

Expect 15,706,484,224 parameters, 2.7B of them at work on each token, 5.7T tokens in about 302,000 steps. The tokenizer
is DeepSeek's or one of at most 102,400 tokens. The standard deviation of the initial weights is not published; it is
V2's here.
"""

from moejax.config import (
    AttentionConfig,
    BalanceConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    Phase,
    PipelineConfig,
    RunConfig,
    ScheduleConfig,
)


def config() -> RunConfig:
    """The run."""
    return RunConfig(
        name="deepseek_v2_lite",
        model=ModelConfig(
            vocab_size=102400,
            hidden_size=2048,
            num_layers=27,
            num_dense_layers=1,
            dense_width=10944,
            attention=AttentionConfig(num_heads=16, q_lora_rank=None, kv_lora_rank=512),
            moe=MoEConfig(
                num_experts=64,
                num_shared=2,
                top_k=6,
                num_groups=1,
                top_groups=1,
                expert_width=1408,
                gate="greedy",
                normalize_weights=False,
                route_scale=1.0,
                balance=BalanceConfig(sequence=0.001),
            ),
            mtp=MTPConfig(depth=0),
            init_std=0.006,
        ),
        optimizer=OptimizerConfig(peak_lr=4.2e-4, moments="fp32"),
        schedule=ScheduleConfig(
            tokens=5.7e12,
            warmup_steps=2000,
            learning_rate=(
                Phase(until=0.8, value=1.0),
                Phase(until=0.9, value=0.316),
                Phase(until=1.0, value=0.316**2),
            ),
            bias_update_speed=(Phase(until=1.0, value=0.0),),
        ),
        pipeline=PipelineConfig(microbatches=36),  # of 128 rows
        data=DataConfig(tokenizer="tokenizer.json", sequence_length=4096, batch_size=4608, fim_rate=0.0),
    )
