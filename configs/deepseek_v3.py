"""DeepSeek-V3, 671B, with its published pre-training recipe (arXiv:2412.19437, sections 2 and 4.2).

    python -m moejax train configs/deepseek_v3.py --data.train TEXT... --data.tokenizer tokenizer.json MESH

MESH on DeepSeek's 2048 GPUs is --mesh.pipe 16 --mesh.data 2 --mesh.expert 64 --mesh.expert-nodes 8. What a GPU has to
hold there is in tools/RESULTS.md: 84 GB in FP8, with the slack and the deferral that are set here. DualPipe on 16
stages takes 32 micro-batches at least, so that the batch cannot start at 3072 sequences there: add
--schedule.ramp-start 4096 --schedule.ramp-increment 1024.

Expect 671,026,419,200 parameters (and 11,610,068,224 of the MTP module), 37.6B of them at work on each token, 250 GFLOP
a token at this length, 14.8T tokens in about 245,000 steps. DeepSeek used 2,664,000 GPU-hours of the H800. The sizes
are the defaults of `moejax.config`; what is stated here is the run. The tokenizer is DeepSeek's or one of at most
129,280 tokens. Not published: the shape of the batch ramp (here eight equal jumps), Adam's epsilon (here 1e-8).

Long context (section 4.3) goes on from the end of this run, twice for 1000 steps at a constant learning rate of
7.3e-6: sequences of 32,768 in batches of 1920, then of 131,072 in batches of 480, both with

    attention = AttentionConfig(yarn=YarnConfig())
"""

from moejax.config import DataConfig, MeshConfig, PipelineConfig, RunConfig, ScheduleConfig


def config() -> RunConfig:
    """The run."""
    return RunConfig(
        name="deepseek_v3",
        precision="fp8",
        schedule=ScheduleConfig(tokens=14.8e12, ramp_start=3072, ramp_increment=1536, ramp_until=469e9 / 14.8e12),
        mesh=MeshConfig(exchange_slack=1.15),
        # micro-batches of 128 rows, one for each pipeline of DeepSeek's; a weight gradient put off would take 4 GB
        pipeline=PipelineConfig(microbatches=120, max_deferred_w=0),
        data=DataConfig(tokenizer="tokenizer.json", sequence_length=4096, batch_size=15360, fim_rate=0.1),
    )
