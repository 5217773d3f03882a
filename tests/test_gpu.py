"""The same job on CUDA. Marked ``gpu``; skipped where PyTorch sees no device."""

import planted
import pytest
import torch

from autoreid import data
from autoreid.evaluate import extract
from autoreid.network import find_model, load_weights
from autoreid.recipe import Recipe
from autoreid.runs import Run
from autoreid.search import SearchSettings, search
from autoreid.space import SearchSpace
from autoreid.supernet import Supernet
from autoreid.train import retrain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = SearchSettings(
    channels=4, layers=(1, 1), stem="half", input=(32, 16), identities=4, images=3, epochs=2, alpha_warmup=1, pad=2
)


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    return planted.write_dataset(tmp_path_factory.mktemp("market"), planted.texture, identities=10, test_identities=4)


def test_gdas_draws_the_same_operations_as_on_the_cpu():
    torch.manual_seed(0)
    net = Supernet(SearchSpace.load("reid"), 4, (1, 1), "half")
    drawn = []
    for device in ("cpu", "cuda"):
        weights = net.to(device).sample(1.0, torch.Generator().manual_seed(5))
        drawn.append([choice.index for row in weights.values() for choice in row])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("method", ["darts", "darts-2", "gdas"])
def test_a_search_runs_and_resumes(market, tmp_path, method):
    from dataclasses import replace

    samples, settings = data.load("market", market, parts=("train",)).train, replace(SMALL, method=method)
    space = SearchSpace.load("reid")
    first = search(space, samples, settings, Run(tmp_path, {}, resume=False, overwrite=False), device="cuda")
    (tmp_path / "summary.json").unlink()  # as if killed before its last file: the state comes from the checkpoint
    again = search(space, samples, settings, Run(tmp_path, {}, resume=True, overwrite=False), device="cuda")
    assert first.genotype == again.genotype and first.peak_memory_bytes > 0


def test_a_retrained_net_gives_the_same_features_on_both_devices(market, tmp_path):
    recipe = Recipe(input=(32, 16), epochs=1, warmup_epochs=0, identities=4, images=3, pad=2)
    spec = find_model("random-reid", {"channels": 4, "layers": "1,1"})
    path, result = retrain(spec, "market", recipe, tmp_path, root=str(market), device="cuda")
    assert result["train"]["device"] == "cuda" and result["latency_ms"]["device"] == "cuda"
    net, _ = load_weights(path.with_suffix(".safetensors"))
    samples = data.load("market", market).query
    on_cpu, on_gpu = (extract(net.to(device), samples, (32, 16), device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_cpu, on_gpu, rtol=1e-2, atol=1e-2)  # TF32 convolutions
