"""Heads of a base in half precision stay wide under every strategy: against one process, on two gloo ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import adapter_state_dict
from tests.distributed.gpt import biased, hugging_face
from tests.distributed.launch import launch
from tests.distributed.wide_script import classifier, scaler, train

STRATEGIES = ["ddp", "megatron_lora", "fsdp_lora", "trained in shards"]
CASES: dict[str, tuple[torch.dtype, Any]] = {
    "bf16": (torch.bfloat16, lambda: {"precision": "bf16-true"}),
    "converted": (torch.float32, lambda: {"precision": "bf16-true"}),
    "scaled": (torch.float16, lambda: {"plugins": [scaler()]}),
}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("single")
    return {
        case: adapter_state_dict(train(directory / case, "auto", 0, 1, dtype, **settings()))
        for case, (dtype, settings) in CASES.items()
    }


@pytest.fixture(scope="module", params=STRATEGIES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    return {
        "directory": directory,
        "name": request.param,
        "found": launch("wide_script.py", 2, directory, request.param),
    }


@pytest.mark.parametrize("case", CASES)
def test_every_step_counts_as_in_one_process(ranks: dict[str, Any], single: dict[str, Any], case: str) -> None:
    start = classifier(CASES[case][0]).state_dict()
    for rank in ranks["found"]:
        assert rank[case]["dtypes"] == ["torch.float32"]
        for name in ("score.weight", "model.embed_tokens.weight"):
            values, expected = rank[case]["trained"][name], single[case][name]
            moved = (expected - start[name].float()).abs().max().item()
            assert moved > 0
            # what ranks add up was rounded to half precision on each: 2^-8 of the largest addend
            torch.testing.assert_close(values, expected, rtol=0, atol=0.05 * moved)


def test_ranks_hold_the_same(ranks: dict[str, Any]) -> None:
    one, other = ranks["found"]
    for case in CASES:
        assert all(torch.equal(value, other[case]["trained"][name]) for name, value in one[case]["trained"].items())


def test_the_file_holds_them_wide(ranks: dict[str, Any]) -> None:
    saved = torch.load(Path(ranks["directory"]) / "bf16" / "last.ckpt", weights_only=True)["state_dict"]
    for name in ("score.weight", "model.embed_tokens.weight"):
        assert torch.equal(saved[f"model.{name}"], ranks["found"][0]["bf16"]["trained"][name])


def test_taken_out_they_have_the_bases_dtype(ranks: dict[str, Any]) -> None:
    in_shards = ranks["name"] == "trained in shards"  # those stay wide, and are read in the base's
    for rank in ranks["found"]:
        wide = ["torch.bfloat16", "torch.float32"] if in_shards else ["torch.bfloat16"]
        assert rank["merged"]["dtypes"] == wide
        assert rank["removed"] == wide
        assert rank["merged"]["merged"].dtype == torch.bfloat16
        # a merged weight is rounded once, the sum of base and adapter at another place
        torch.testing.assert_close(rank["merged"]["merged"], rank["merged"]["adapted"], rtol=5e-2, atol=5e-2)


def test_a_step_in_fabric_counts(ranks: dict[str, Any]) -> None:
    one, other = (rank["fabric"] for rank in ranks["found"])
    assert one["dtypes"] == other["dtypes"] == ["torch.float32"]
    assert one["moved"]
    assert torch.equal(one["values"], other["values"])


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    directory = tmp_path_factory.mktemp("gpt")
    hugging_face().save_pretrained(directory / "hf")
    biased().save_pretrained(directory / "biased")
    return launch("wide_script.py", 2, directory, "gpt")


@pytest.mark.parametrize("what", ["heads", "biases"])
def test_what_of_a_megatron_model_trains_stays_wide(gpt: list[Any], what: str) -> None:
    one, spread = gpt[0][f"{what} 1"], gpt[0][f"{what} 2"]
    assert one["trained"].keys() == spread["trained"].keys()
    for rank in gpt:
        for size in (1, 2):
            assert rank[f"{what} {size}"]["dtypes"] == ["torch.float32"]
            assert rank[f"{what} {size}"]["removed"] == ["torch.bfloat16"]
            for name, value in rank[f"{what} {size}"]["trained"].items():
                assert torch.equal(value, gpt[0][f"{what} {size}"]["trained"][name])
    for name, value in spread["trained"].items():
        expected = one["trained"][name]
        moved = (expected - one["start"][name].float()).abs().max().item()
        assert moved > 0
        # products in parts are rounded to bfloat16 at another place: 2^-8 of the largest addend of a gradient
        torch.testing.assert_close(value, expected, rtol=0, atol=0.1 * moved)
