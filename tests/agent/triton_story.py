"""What Triton's own client is tried with, in an environment of its own: PORT, and a file with inputs and expected outputs."""

from __future__ import annotations

import sys

import numpy as np
from tritonclient import http
from tritonclient.utils import InferenceServerException


def works(port: str, x: np.ndarray, expected: np.ndarray) -> None:
    client = http.InferenceServerClient(f"127.0.0.1:{port}", concurrency=4)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m")
    assert client.is_model_ready("m", "1.0")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "edgekit"
    assert client.get_model_metadata("m")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert client.get_model_config("m")["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 4]}]
    assert client.get_model_repository_index() == [{"name": "m", "version": "1.0", "state": "READY", "reason": ""}]
    for is_binary_in in (True, False):
        for is_binary_out in (True, False):
            tensor = http.InferInput("x", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x, binary_data=is_binary_in)
            wanted = http.InferRequestedOutput("y", binary_data=is_binary_out)
            result = client.infer("m", [tensor], outputs=[wanted], request_id="r-7", model_version="1.0")
            assert np.allclose(result.as_numpy("y"), expected, atol=1e-4)
            answer = result.get_response()
            assert (answer["id"], answer["model_version"]) == ("r-7", "1.0")
            assert answer["parameters"]["prediction_id"] == "r-7"
            assert answer["parameters"]["model_digest"].startswith("sha256:")
    tensor = http.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    pending = [client.async_infer("m", [tensor]) for _ in range(20)]
    assert all(np.allclose(each.get_result().as_numpy("y"), expected, atol=1e-4) for each in pending)
    (stats,) = client.get_inference_statistics("m")["model_stats"]
    assert (stats["inference_count"], stats["inference_stats"]["success"]["count"]) == (24 * len(x), 24)
    client.close()


def refused(call, words: str) -> None:
    try:
        call()
    except InferenceServerException as error:
        if words in str(error):
            return
        raise
    raise AssertionError(f"not refused: {words}")


def is_told(port: str) -> None:
    client = http.InferenceServerClient(f"127.0.0.1:{port}")
    tensor = http.InferInput("x", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 3), np.float32))
    refused(lambda: client.infer("m", [tensor]), "shape")
    refused(lambda: client.infer("other", [tensor]), "not served here; m is")
    refused(lambda: client.infer("m", [tensor], request_compression_algorithm="gzip"), "uncompressed")
    refused(client.get_system_shared_memory_status, "no such resource")
    client.close()


if __name__ == "__main__":
    data = np.load(sys.argv[2])
    works(sys.argv[1], data["x"], data["y"])
    is_told(sys.argv[1])
    sys.stdout.write("unchanged\n")
