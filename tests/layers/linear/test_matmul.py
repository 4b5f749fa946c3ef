"""Matmuls by measured algorithms: the tables, and that they compute what torch computes."""

import json

import pytest
import torch

from tpllm.layers.linear import cublaslt, matmul
from tpllm.layers.linear.cublaslt import Algorithm
from tpllm.layers.linear.matmul import (
    Matmul,
    fast_matmul,
    load_table,
    plain_matmul,
    save_table,
)
from tpllm.layers.linear.matmul_algorithms import table_path

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TABLES = sorted(table_path("any").parent.glob("*.json"))
ALGORITHM = Algorithm(66, 20, 2, 2, 0, 1, 35, 0, 5)


@pytest.fixture
def version_1(tmp_path, monkeypatch):
    """A cuBLASLt of version 1, and tables in a temporary folder."""
    monkeypatch.setattr(cublaslt, "version", lambda: 1)
    monkeypatch.setattr(matmul, "table_path", lambda gpu: tmp_path / f"{gpu}.json")


def test_a_table_comes_back_as_it_was_saved(version_1) -> None:
    table = {(16, 48, 32): ALGORITHM, (8, 48, 32): ALGORITHM._replace(split_k=1)}
    save_table("here", table)
    assert load_table("here") == table
    assert load_table("elsewhere") == {}


def test_a_table_of_another_cublaslt_is_not_used(version_1, monkeypatch) -> None:
    save_table("here", {(16, 48, 32): ALGORITHM})
    monkeypatch.setattr(cublaslt, "version", lambda: 2)
    assert load_table("here") == {}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_tables_are_of_one_gpu_and_have_a_shape_once(path) -> None:
    table = json.loads(path.read_text())
    assert table_path(table["gpu"]) == path
    assert table["fields"] == ["M", "N", "K", *Algorithm._fields]
    assert {len(row) for row in table["matmuls"]} == {len(table["fields"])}
    shapes = [tuple(row[:3]) for row in table["matmuls"]]
    assert shapes == sorted(set(shapes))


def test_without_a_table_torch_computes_matmuls(device) -> None:
    x, weight = torch.randn(3, 16, device=device), torch.randn(5, 16, device=device)
    out = torch.empty(3, 5, device=device)
    assert plain_matmul(x, weight, out) is out
    assert torch.equal(out, x @ weight.t())
    assert torch.equal(fast_matmul(torch.float32, device)(x, weight), x @ weight.t())


def test_the_name_lists_what_computes_matmuls() -> None:
    assert plain_matmul.name == "torch"
    assert fast_matmul(torch.float32, torch.device("cpu")).name == "one row by our kernel, torch"
    measured = Matmul({(16, 48, 32): ALGORITHM})
    assert measured.name == "1 shapes by measured algorithms, torch"


@pytest.mark.gpu
def test_every_measured_matmul_is_as_accurate_as_torchs(assert_as_accurate) -> None:
    device = torch.device("cuda")
    table = load_table(torch.cuda.get_device_name())
    if not table:
        pytest.skip("no table for this GPU and this cuBLASLt")
    tuned = Matmul(table)
    generator = torch.Generator(device).manual_seed(0)
    for M, N, K in table:
        x, weight = (
            torch.randn(rows, K, generator=generator, device=device, dtype=torch.bfloat16)
            for rows in (M, N)
        )
        y = tuned(x, weight)
        out = torch.full_like(y, float("nan"))
        assert tuned(x, weight, out) is out
        assert torch.equal(out, y)
        # float32 is exact enough beside bfloat16, and float64 would take minutes
        assert_as_accurate(y, x @ weight.t(), x.float() @ weight.float().t())
    assert all(tuned._matmuls.values())


@pytest.mark.gpu
def test_torch_computes_what_an_algorithm_cannot() -> None:
    shape = (16, 48, 64)
    x, weight = torch.randn(16, 64, device="cuda"), torch.randn(48, 64, device="cuda")
    x, weight = x.bfloat16(), weight.bfloat16()
    impossible = Matmul({shape: ALGORITHM._replace(tile=9999)})
    assert torch.equal(impossible(x, weight), x @ weight.t())
