"""torch.compile of a model with memory: one graph in inference, and the same logits."""

from __future__ import annotations

import pytest
import torch

from conftest import batch, tiny_model


@pytest.mark.parametrize("options", [{}, {"mode": "replacement"}, {"table_dtype": "bfloat16"}], ids=str)
def test_inference_compiles_without_a_graph_break(options: dict[str, str]):
    model = tiny_model(base={"num_hidden_layers": 2}, layers=[1], init="paper", **options).eval()
    tokens = batch(2, 12)
    tokens.pop("labels")
    tokens["attention_mask"][0, 7:] = 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # a graph break raises
    with torch.no_grad():
        expected, got = model(**tokens).logits, compiled(**tokens).logits
        with model.disable_adapter():
            without = model(**tokens).logits
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert float((expected - without).abs().max()) > 1e-4, "the memory says something"
