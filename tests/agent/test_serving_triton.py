"""A standard client of the protocol works unchanged: Triton's own, over HTTP."""

from __future__ import annotations

import numpy as np
import pytest

from tests.agent.world import build_model

X = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)


@pytest.fixture
def served(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    return agent


def test_tritonclient_works_unchanged(served):
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(f"127.0.0.1:{served.port}", concurrency=4)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m")
    assert client.is_model_ready("m", "1.0")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "edgekit"
    metadata = client.get_model_metadata("m")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    config = client.get_model_config("m")
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 4]}]
    assert client.get_model_repository_index() == [{"name": "m", "version": "1.0", "state": "READY", "reason": ""}]

    expected = X @ build_model(1)[1]
    for is_binary_in in (True, False):
        for is_binary_out in (True, False):
            tensor = http.InferInput("x", list(X.shape), "FP32")
            tensor.set_data_from_numpy(X, binary_data=is_binary_in)
            wanted = http.InferRequestedOutput("y", binary_data=is_binary_out)
            result = client.infer("m", [tensor], outputs=[wanted], request_id="r-7", model_version="1.0")
            assert np.allclose(result.as_numpy("y"), expected, atol=1e-4)
            answer = result.get_response()
            assert (answer["id"], answer["model_version"]) == ("r-7", "1.0")
            assert answer["parameters"]["prediction_id"] == "r-7"
            assert answer["parameters"]["model_digest"].startswith("sha256:")
    tensor = http.InferInput("x", list(X.shape), "FP32")
    tensor.set_data_from_numpy(X)
    pending = [client.async_infer("m", [tensor]) for _ in range(20)]
    assert all(np.allclose(each.get_result().as_numpy("y"), expected, atol=1e-4) for each in pending)

    (stats,) = client.get_inference_statistics("m")["model_stats"]
    assert (stats["inference_count"], stats["inference_stats"]["success"]["count"]) == (72, 24)
    client.close()


def test_tritonclient_is_told_what_does_not_go(served):
    http = pytest.importorskip("tritonclient.http")
    from tritonclient.utils import InferenceServerException

    client = http.InferenceServerClient(f"127.0.0.1:{served.port}")
    tensor = http.InferInput("x", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 3), np.float32))
    with pytest.raises(InferenceServerException, match="shape"):
        client.infer("m", [tensor])
    with pytest.raises(InferenceServerException, match="not served here; m is"):
        client.infer("other", [tensor])
    with pytest.raises(InferenceServerException, match="uncompressed"):
        client.infer("m", [tensor], request_compression_algorithm="gzip")
    with pytest.raises(InferenceServerException, match="no such resource"):
        client.get_system_shared_memory_status()
    client.close()
