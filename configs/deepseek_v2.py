"""DeepSeek-V2, 236B, with its published pre-training recipe (arXiv:2405.04434, sections 2 and 3.1).

    python -m moejax train configs/deepseek_v2.py --data.train TEXT... --data.tokenizer tokenizer.json

Expect 235,741,434,880 parameters, 21.4B of them at work on each token, 155 GFLOP a token at this length, 8.1T tokens in
about 221,000 steps. The tokenizer is DeepSeek's or one of at most 102,400 tokens. The shape of the batch ramp is not
published (here nine equal jumps). DeepSeek dropped the tokens beyond a device's capacity in training; here none is.

Long context goes on from the end of this run for 1000 steps on sequences of 32,768 in batches of 576, with

    attention = dataclasses.replace(attention, yarn=YarnConfig(mscale=0.707, mscale_all_dim=0.707))
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
        name="deepseek_v2",
        model=ModelConfig(
            vocab_size=102400,
            hidden_size=5120,
            num_layers=60,
            num_dense_layers=1,
            dense_width=12288,
            attention=AttentionConfig(num_heads=128, q_lora_rank=1536, kv_lora_rank=512),
            moe=MoEConfig(
                num_experts=160,
                num_shared=2,
                top_k=6,
                num_groups=8,
                top_groups=3,
                expert_width=1536,
                gate="group_limited_greedy",
                normalize_weights=False,
                route_scale=16.0,
                balance=BalanceConfig(sequence=0.003, device=0.05, communication=0.02, devices=8, device_limit=3),
            ),
            mtp=MTPConfig(depth=0),
            init_std=0.006,
        ),
        optimizer=OptimizerConfig(peak_lr=2.4e-4, moments="fp32"),
        schedule=ScheduleConfig(
            tokens=8.1e12,
            warmup_steps=2000,
            learning_rate=(
                Phase(until=0.6, value=1.0),
                Phase(until=0.9, value=0.316),
                Phase(until=1.0, value=0.316**2),
            ),
            bias_update_speed=(Phase(until=1.0, value=0.0),),
            ramp_start=2304,
            ramp_increment=768,
            ramp_until=225e9 / 8.1e12,
        ),
        pipeline=PipelineConfig(microbatches=72),  # of 128 rows
        data=DataConfig(tokenizer="tokenizer.json", sequence_length=4096, batch_size=9216, fim_rate=0.0),
    )
