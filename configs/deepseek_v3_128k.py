"""DeepSeek-V3's second long-context stage: 1000 steps of 131,072 tokens (arXiv:2412.19437, section 4.3).

    python -m moejax train configs/deepseek_v3_128k.py --data.train TEXT... --resume-from runs/deepseek_v3_32k

It starts with the weights of the first stage, YaRN as there, at a constant learning rate of 7.3e-6, in
batches of 480 sequences. The biases of the router no longer move, and the MTP loss keeps its last weight, 0.1, as at
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
        name="deepseek_v3_128k",
        steps=1000,
        resume_from="runs/deepseek_v3_32k",
        model=ModelConfig(attention=AttentionConfig(yarn=YarnConfig())),
        optimizer=OptimizerConfig(peak_lr=7.3e-6),
        schedule=ScheduleConfig(
            warmup_steps=0,
            learning_rate=(Phase(until=1.0, value=1.0),),
            bias_update_speed=(Phase(until=1.0, value=0.0),),
            mtp_weight=(Phase(until=1.0, value=0.1),),
        ),
        data=DataConfig(tokenizer="tokenizer.json", sequence_length=131072, batch_size=480, fim_rate=0.1),
    )
