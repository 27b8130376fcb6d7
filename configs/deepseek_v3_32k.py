"""DeepSeek-V3's first long-context stage: 1000 steps of 32,768 tokens (arXiv:2412.19437, section 4.3).

    python -m moejax train configs/deepseek_v3_32k.py --data.train TEXT... --resume-from runs/deepseek_v3

It starts with the weights of the pre-training run, YaRN on the rotary part, at a constant learning rate of 7.3e-6, in
batches of 1920 sequences. The biases of the router no longer move, and the MTP loss keeps its last weight, 0.1, as at
the end of pre-training: the report does not say otherwise. Nor does it say what became of the optimizer's moments;
they start anew, unless `--resume-optimizer True`.
"""

from moejax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Phase,
    RunConfig,
    ScheduleConfig,
    YarnConfig,
)


def config() -> RunConfig:
    """The run."""
    return RunConfig(
        name="deepseek_v3_32k",
        steps=1000,
        resume_from="runs/deepseek_v3",
        model=ModelConfig(attention=AttentionConfig(yarn=YarnConfig())),
        optimizer=OptimizerConfig(peak_lr=7.3e-6),
        schedule=ScheduleConfig(
            warmup_steps=0,
            learning_rate=(Phase(until=1.0, value=1.0),),
            bias_update_speed=(Phase(until=1.0, value=0.0),),
            mtp_weight=(Phase(until=1.0, value=0.1),),
        ),
        data=DataConfig(tokenizer="tokenizer.json", sequence_length=32768, batch_size=1920, fim_rate=0.1),
    )
