import json
from pathlib import Path

import naive
import numpy as np
import pytest
from safetensors.numpy import save_file

import moejax

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["v3", "v2"])
def test_expert_counts_are_those_of_a_naive_model(name, tmp_path):
    with np.load(GOLDEN / f"{name}.npz") as file:
        config, tokens = json.loads(str(file["config"])), file["tokens"]
        weights = {key.removeprefix("weight:"): file[key].astype(np.float32) for key in file if "weight:" in key}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    experts = config["n_routed_experts"]
    of_rows = [[ids for ids, _ in naive.backbone(weights, config, row)[1]] for row in tokens]
    want = [
        np.bincount(np.concatenate([ids.ravel() for ids in layer]), minlength=experts)
        for layer in zip(*of_rows, strict=True)
    ]
    np.testing.assert_array_equal(moejax.load(tmp_path).expert_counts(tokens), want)
